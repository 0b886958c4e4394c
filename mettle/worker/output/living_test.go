//go:build linux

package output

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
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

// What a process that lives puts in the place of a file of an output directory, after
// that was listed, is not waited for either, and is no empty file.
func TestWork_entry_otherThanAFile(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(dir, "out"), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	w := &work{c: &Collector{}, req: &Request{Function: digest.SHA256}}
	done := make(chan error, 1)
	go func() {
		done <- w.entry(t.Context(), &treeBuilder{}, &repb.Directory{}, entry{dir: d, rel: "out", name: "out", kind: fs.FileMode(0)})
	}()
	select {
	case err := <-done:
		if err == nil {
			t.Error("a FIFO was taken for a file")
		}
	case <-time.After(10 * time.Second):
		t.Error("it waits for a writer of the FIFO")
		if f, err := os.OpenFile(filepath.Join(dir, "out"), os.O_WRONLY, 0); err == nil {
			f.Close() // so that the goroutine ends
		}
		<-done //nolint:errcheck // it may have been refused
	}
}
