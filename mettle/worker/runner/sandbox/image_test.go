//go:build linux

package sandbox_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/runner/runnertest"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

// tools are what the tests below run in images.
func tools(t *testing.T) string {
	t.Helper()
	dir := layer(t)
	runnertest.CopyPrograms(t, dir, "sh", "ls", "cat", "id", "mkdir", "readlink", "env", "sleep", "stat")
	return dir
}

func layer(t *testing.T, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// needsOverlay skips where this machine mounts no overlays in user namespaces.
func needsOverlay(t *testing.T) {
	t.Helper()
	r, err := sandbox.New(sandbox.Options{Layers: []string{layer(t)}})
	if err == nil {
		r.Close()
		return
	}
	if errors.Is(allowed(), unix.EPERM) || strings.Contains(err.Error(), "no such device") {
		t.Skip(err)
	}
	t.Fatal(err)
}

func TestRunner_layers(t *testing.T) {
	needsOverlay(t)
	below, above := layer(t, "opt/a", "opt/b", "opt/d/x"), layer(t, "opt/a", "opt/c", "opt/d/y")
	if err := os.WriteFile(filepath.Join(above, "opt/a"), []byte("above"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mknod(filepath.Join(above, "opt/b"), unix.S_IFCHR, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setxattr(filepath.Join(above, "opt/d"), "user.overlay.opaque", []byte("y"), 0); err != nil {
		t.Skip(err)
	}
	b := with(t, sandbox.Options{Layers: []string{tools(t), below, above}})
	if got := tell(t, b, "cd /opt && ls && cat a && ls d"); got != "a\nc\nd\nabovey" {
		t.Errorf("got %q", got)
	}
	t.Run("nothing of the host", func(t *testing.T) {
		if got := tell(t, b, "ls -A /etc"); strings.Replace(got, "ld.so.cache\n", "", 1) != "hosts\nresolv.conf" {
			t.Errorf("got %q", got)
		}
		entries, err := os.ReadDir("/")
		if err != nil {
			t.Fatal(err)
		}
		own := []string{"bin", "lib", "lib32", "lib64", "usr", "opt", "proc", "dev", "tmp", "etc", "var", "build"}
		for _, e := range entries {
			if !slices.Contains(own, e.Name()) {
				wantRefused(t, b, "ls -d '/"+e.Name()+"'")
			}
		}
		wantRefused(t, b, "cat /etc/passwd")
	})
	t.Run("names with the network", func(t *testing.T) {
		for _, name := range []string{"/etc/resolv.conf", "/etc/hosts"} {
			want, err := os.ReadFile(name)
			if err != nil {
				t.Skip(err)
			}
			b := with(t, sandbox.Options{Layers: []string{tools(t)}, Network: sandbox.HostNetwork})
			if got := tell(t, b, "cat "+name); got != strings.TrimSpace(string(want)) {
				t.Errorf("%s is %q, want the host's", name, got)
			}
		}
	})
	t.Run("what is not its root is read-only", func(t *testing.T) {
		for _, path := range []string{"/x", "/opt/x", "/etc/hosts", "/opt/a"} {
			wantRefused(t, b, "echo x > "+path)
		}
		if got := tell(t, b, "echo out > out; echo t > /tmp/x; echo t > /var/tmp/x; cat out /etc/resolv.conf; cat /etc/hosts; pwd"); !strings.HasPrefix(got, "out\n127.0.0.1\tlocalhost\n") || !strings.HasSuffix(got, "\n/build") {
			t.Errorf("got %q", got)
		}
	})
}

func TestRunner_manyLayers(t *testing.T) {
	needsOverlay(t)
	layers := []string{tools(t)}
	for i := range sandbox.MaxLayers - 1 {
		layers = append(layers, layer(t, fmt.Sprint("opt/", i)))
	}
	b := with(t, sandbox.Options{Layers: layers})
	if got := tell(t, b, fmt.Sprintf("cat /opt/0 /opt/%d; cd /opt; set -- *; echo $#", sandbox.MaxLayers-2)); got != fmt.Sprintf("opt/0opt/%d%d", sandbox.MaxLayers-2, sandbox.MaxLayers-1) {
		t.Errorf("got %q", got)
	}
	layers = append(layers, layer(t, "x"))
	if r, err := sandbox.New(sandbox.Options{Layers: layers}); !errors.Is(err, sandbox.ErrOptions) {
		t.Errorf("New with a layer more: %v", err)
		r.Close()
	}
}

// An image may have anything where the sandbox needs a directory of its own.
func TestRunner_layersInTheWay(t *testing.T) {
	needsOverlay(t)
	for name, make := range map[string]func(dir string) error{
		"symlinks to the host's": func(dir string) error {
			var err error
			for _, n := range []string{"proc", "dev", "tmp", "build", "etc", "var"} {
				err = errors.Join(err, os.Symlink("/root", filepath.Join(dir, n)))
			}
			return err
		},
		"files": func(dir string) error {
			var err error
			for _, n := range []string{"proc", "dev", "tmp", "build", "etc", "var"} {
				err = errors.Join(err, os.WriteFile(filepath.Join(dir, n), nil, 0o644))
			}
			return err
		},
		"whiteouts": func(dir string) error {
			var err error
			for _, n := range []string{"proc", "dev", "tmp", "build", "etc", "var"} {
				err = errors.Join(err, unix.Mknod(filepath.Join(dir, n), unix.S_IFCHR, 0))
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := layer(t)
			if err := make(dir); err != nil {
				t.Fatal(err)
			}
			b := with(t, sandbox.Options{Layers: []string{tools(t), dir}})
			if got := tell(t, b, "echo hello > /tmp/x; cat /tmp/x; echo > /dev/null; cat /proc/sys/kernel/hostname"); got != "hello\nlocalhost" {
				t.Errorf("got %q", got)
			}
		})
	}
}
