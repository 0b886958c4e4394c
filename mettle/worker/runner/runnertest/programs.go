//go:build linux

package runnertest

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

const loaderCache = "/etc/ld.so.cache"

// CopyPrograms copies programs of this machine, with the libraries that they need,
// to the same paths below dir, and the files to bin as well: enough of a file
// system for them to run in. It skips the test where it can't find out what they
// need.
func CopyPrograms(t testing.TB, dir string, names ...string) {
	t.Helper()
	files := map[string]string{} // from, by to
	for _, name := range names {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Skipf("this machine has no %s", name)
		}
		if path, err = filepath.EvalSymlinks(path); err != nil {
			t.Fatal(err)
		}
		files["/bin/"+name] = path
		out, err := exec.CommandContext(t.Context(), "ldd", path).Output()
		if err != nil {
			continue // it is static
		}
		for _, m := range regexp.MustCompile(`(?m)(/\S+) \(0x[0-9a-f]+\)$`).FindAllStringSubmatch(string(out), -1) {
			files[m[1]] = m[1]
		}
	}
	if _, err := os.Stat(loaderCache); err == nil {
		files[loaderCache] = loaderCache // or each program looks for its libraries everywhere
	}
	for to, from := range files {
		data, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		to = filepath.Join(dir, to)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil { //nolint:gosec // for commands
			t.Fatal(err)
		}
		if err := os.WriteFile(to, data, 0o755); err != nil { //nolint:gosec // a program
			t.Fatal(err)
		}
	}
}
