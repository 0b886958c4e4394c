//go:build linux

package sandbox_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

// hostDir is a directory that a sandbox shows, unlike those for temporary files.
func hostDir(t *testing.T) string {
	t.Helper()
	for _, base := range []string{"/var/cache", "/opt", "/srv"} {
		dir, err := os.MkdirTemp(base, "sandbox-test-") //nolint:usetesting // as said
		if err != nil {
			continue
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // the point of it
			t.Fatal(err)
		}
		return dir
	}
	t.Skip("may make no directory that a sandbox shows")
	return ""
}

func TestRunner_hideAndShow(t *testing.T) {
	dir := hostDir(t)
	for _, name := range []string{"a/secret/key", "a/plain", "a/shown/f", "a/shown/secret", "b"} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(dir+"/a/shown/f", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	list := "cd " + dir + "; find . -type f | sort | tr '\\n' ' '"
	for _, tc := range []struct {
		name       string
		hide, show []string
		want       string
	}{
		{"nothing", nil, nil, "./a/plain ./a/secret/key ./a/shown/f ./a/shown/secret ./b"},
		{"a directory", []string{"/a"}, nil, "./b"},
		{"a directory, shown below", []string{"/a"}, []string{"/a/shown"}, "./a/shown/f ./a/shown/secret ./b"},
		{"hidden below what is shown", []string{"/a", "/a/shown/secret"}, []string{"/a/shown"}, "./a/shown/f ./a/shown/secret ./b"},
		{"a file", []string{"/a"}, []string{"/a/shown/f"}, "./a/shown/f ./b"},
		{"by a symlink", []string{"/a"}, []string{"/link"}, "./a/shown/f ./b"},
		{"what is both is shown", []string{"/a"}, []string{"/a"}, "./a/plain ./a/secret/key ./a/shown/f ./a/shown/secret ./b"},
		{"what is not hidden", []string{"/a/secret"}, []string{"/b"}, "./a/plain ./a/shown/f ./a/shown/secret ./b"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			below := func(names []string) (paths []string) {
				for _, n := range names {
					paths = append(paths, dir+n)
				}
				return paths
			}
			b := with(t, sandbox.Options{Hide: below(tc.hide), Show: below(tc.show)})
			if got := tell(t, b, list); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
			wantRefused(t, b, "touch "+dir+"/x", "touch "+dir+"/a/x", "touch "+dir+"/a/shown/x", "echo x > "+dir+"/a/shown/f")
			if len(tc.hide) > 1 {
				wantRefused(t, b, "grep . "+dir+tc.hide[1])
			}
		})
	}
}

func TestNew_refusesToShow(t *testing.T) {
	for _, path := range []string{"relative", "/", "/no/such/path", "/proc/self", "/tmp", "/dev/null"} {
		r, err := sandbox.New(sandbox.Options{Show: []string{path}})
		if err == nil {
			t.Errorf("New that shows %s succeeded: %v", path, r.Close())
		} else if !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// Whom to ask for names is told to who has a network, wherever the host keeps it.
func TestRunner_resolvConf(t *testing.T) {
	want, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		t.Skip(err)
	}
	b := with(t, sandbox.Options{Network: sandbox.HostNetwork, Hide: []string{"/etc"}})
	if got := tell(t, b, "cat /etc/resolv.conf; ls -A /etc | wc -l"); got != strings.TrimSpace(string(want))+"\n1" {
		t.Errorf("got %q, want what the host has", got)
	}
	wantRefused(t, with(t, sandbox.Options{Hide: []string{"/etc"}}), "cat /etc/resolv.conf")
}

// A file of credentials is renewed by a rename, or by a symlink to another.
func TestRunner_hidesWhatIsRenewed(t *testing.T) {
	dir, err := os.MkdirTemp("/var/lib", "sandbox-test-*") //nolint:usetesting // not below /tmp, which is hidden anyway
	if err != nil {
		t.Skipf("no directory can be made that commands see: %v", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte("secret"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	link := func(target, name string) {
		t.Helper()
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	rename := func(from, to string) {
		t.Helper()
		if err := os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)); err != nil {
			t.Fatal(err)
		}
	}
	write("token")
	write("first")
	link("first", "link")
	all := []string{filepath.Join(dir, "token"), filepath.Join(dir, "link"), filepath.Join(dir, "late")}
	b := with(t, sandbox.Options{Hide: all})
	look := "! grep -s secret " + strings.Join(all, " ")
	tell(t, b, look)
	for range 2 {
		write("new")
		rename("new", "token")
		write("second")
		link(filepath.Join(dir, "second"), "new")
		rename("new", "link")
		write("new")
		rename("new", "late")
		tell(t, b, look)
	}
}
