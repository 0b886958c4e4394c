//go:build linux

package hostile_test

import (
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mettle-build/mettle/mettle/worker/hostile"
)

var update = flag.Bool("update", false, "write the table into the README")

const mark = "<!-- what follows is written by go test -run=TestTable -update -->\n"

func TestTable(t *testing.T) {
	data, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	text, table, ok := strings.Cut(string(data), mark)
	if !ok {
		t.Fatal("the README has no mark")
	}
	if *update {
		if err := os.WriteFile("README.md", []byte(text+mark+hostile.Table()), 0o644); err != nil { //nolint:gosec // a README
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(strings.Split(hostile.Table(), "\n"), strings.Split(table, "\n")); diff != "" {
		t.Errorf("the table in the README is not that of the tests (-want +got):\n%s", diff)
	}
}

func TestGroups(t *testing.T) {
	seen := map[string]bool{}
	for _, g := range hostile.Groups() {
		for _, c := range g.Cases {
			if seen[c.Name] {
				t.Errorf("%q is there twice", c.Name)
			}
			seen[c.Name] = true
			for w, o := range c.Want {
				if o.Verdict == 0 {
					t.Errorf("%q has no outcome in way %v", c.Name, hostile.Way(w))
				}
			}
		}
	}
}
