//go:build linux

package sandbox_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

// TestRunner_stale replaces hidden files as programs that renew tokens do. The commands
// of a Runner that was made before could see them.
func TestRunner_stale(t *testing.T) {
	with(t, sandbox.Options{}) // skips the test where there can be no sandbox
	dir := t.TempDir()
	file := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	token, log, missing := file("token", "a"), file("log", "a"), filepath.Join(dir, "missing")
	made := func() *sandbox.Runner {
		t.Helper()
		r, err := sandbox.New(sandbox.Options{Hide: []string{token, log, missing, "/no/such"}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		})
		return r
	}
	r := made()
	if f, err := os.OpenFile(log, os.O_APPEND|os.O_WRONLY, 0); err != nil {
		t.Fatal(err)
	} else if _, err := f.WriteString("b"); err != nil || f.Close() != nil {
		t.Fatal(err)
	}
	if r.Stale() {
		t.Error("stale by a file that was written to in its place")
	}
	for name, replace := range map[string]func() error{
		"renamed":          func() error { return os.Rename(file("new", "b"), token) },
		"not there before": func() error { return os.WriteFile(missing, []byte("d"), 0o600) },
		"made anew": func() error {
			if err := os.Remove(token); err != nil {
				return err
			}
			return os.WriteFile(token, []byte("e"), 0o600)
		},
	} {
		r := made()
		if err := replace(); err != nil {
			t.Fatal(err)
		}
		if !r.Stale() {
			t.Errorf("%s: not stale", name)
		}
	}
}
