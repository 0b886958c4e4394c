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

// GoldenMetrics lints the metrics of all lists, and compares the page that has them
// after intro as Golden does.
func GoldenMetrics(t testing.TB, file string, update bool, intro string, lists ...[]Metric) {
	t.Helper()
	all, err := Merge(lists...)
	if err != nil {
		t.Fatal(err)
	}
	problems, err := Lint(all, Labels())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Error(p)
	}
	Golden(t, file, update, intro+Markdown(all))
}
