package catalog

import (
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Golden compares a page that is made from a program with what it should be, and
// with update rewrites it first.
func Golden(t testing.TB, file string, update bool, want string) {
	t.Helper()
	if update {
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil { //nolint:gosec // a page for everyone
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, string(got)); d != "" {
		t.Errorf("%s is out of date, run this test with -update (-want +got):\n%s", file, d)
	}
}
