//go:build linux

package output

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/digest"
)

// What a process that lives puts in an output's place, after that was hashed, is not
// waited for.
func TestWork_reopen_otherThanAFile(t *testing.T) {
	dir := t.TempDir()
	root, err := openRootDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.close()
	w := &work{root: root}
	if err := unix.Mkfifo(filepath.Join(dir, "out"), 0o600); err != nil {
		t.Fatal(err)
	}
	if f, err := w.reopen(upload{rel: "out"}); err == nil {
		f.Close()
		t.Error("a FIFO is opened")
	}
}

// A file that grows while it is read is not followed for ever.
func TestHashFile_grows(t *testing.T) {
	f, err := os.Open("/dev/zero") // it has size 0, and no end
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if d, err := hashFile(t.Context(), digest.SHA256, f); err == nil {
		t.Errorf("digest %v", d)
	}
}
