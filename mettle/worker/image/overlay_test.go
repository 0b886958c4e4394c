//go:build linux

package image_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/mettle/worker/image"
	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/runnertest"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

// TestOverlay looks at images as a command does.
func TestOverlay(t *testing.T) {
	tools := t.TempDir()
	runnertest.CopyPrograms(t, tools, "sh", "ls", "cat")
	if r, err := sandbox.New(sandbox.Options{Layers: []string{tools}}); err != nil {
		t.Skipf("this machine does not allow overlays: %v", err)
	} else if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	img := imageOf(t,
		pack(t, file("t/gone", "1"), file("t/back", "1"), file("t/kept", "1"), file("t/d/x", "1"), file("t/d/y", "1"), file("t/o/x", "1"), file("t/file", "1"), file("t/e/x", "1")),
		pack(t, file("t/.wh.gone", ""), file("t/.wh.back", ""), file("t/.wh.d", ""), file("t/o/.wh..wh..opq", ""), file("t/o/new", "2"), file("t/.wh.file", ""), file("t/e/.wh.x", "")),
		pack(t, file("t/back", "3"), file("t/d/z", "3"), file("t/file/f", "3"), file("t/e/y", "3")),
	)
	path := asLayout(t, img)
	for name, prepare := range map[string]func(*image.Cache){"devices": func(*image.Cache) {}, "files": (*image.Cache).AsFiles} {
		t.Run(name, func(t *testing.T) {
			c := open(t, image.Options{LocalDirs: []string{filepath.Dir(path)}})
			if prepare(c); name == "files" && !image.HasFileWhiteouts() {
				t.Skip("this kernel has none")
			}
			got := mustGet(t, c, local(t, path, img))
			if got := run(t, append([]string{tools}, got.Layers...), "cd /t; for f in * */*; do if test -f $f; then echo $f $(cat $f); fi; done; test ! -e gone"); got !=
				"back 3\nkept 1\nd/z 3\ne/y 3\nfile/f 3\no/new 2\n" {
				t.Errorf("got %q", got)
			}
		})
	}
}

// run runs a script in layers, and returns what it printed.
func run(t *testing.T, layers []string, script string) string {
	t.Helper()
	r, err := sandbox.New(sandbox.Options{Layers: layers})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	spec := runner.Spec{Args: []string{"sh", "-c", script}, Root: root, Dir: root, Stdout: filepath.Join(dir, "out"), Stderr: filepath.Join(dir, "err")}
	res, err := r.Run(t.Context(), spec)
	if err != nil || res.ExitCode != 0 {
		t.Fatalf("exit code %d, %v: %s", res.ExitCode, err, strings.TrimSpace(read(t, dir, "err")))
	}
	return read(t, dir, "out")
}
