package conform_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/mettle/conform"
)

// TestCases: each case has a name of its own, and quotes words that are in the
// specification.
func TestCases(t *testing.T) {
	text := specification(t)
	seen := map[string]bool{}
	for _, c := range conform.Cases() {
		if seen[c.Name] {
			t.Errorf("%s is there twice", c.Name)
		}
		seen[c.Name] = true
		if !strings.Contains(text, words(c.Clause)) {
			t.Errorf("%s: the specification does not say %q", c.Name, c.Clause)
		}
	}
	if len(seen) < 150 {
		t.Errorf("%d cases", len(seen))
	}
	t.Logf("%d cases", len(seen))
}

// specification is the comments of the specification's file, which is a dependency.
func specification(t *testing.T) string {
	t.Helper()
	dir, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/bazelbuild/remote-apis").Output()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), "build/bazel/remote/execution/v2/remote_execution.proto"))
	if err != nil {
		t.Fatal(err)
	}
	return words(regexp.MustCompile(`(?m)^\s*//`).ReplaceAllString(string(data), ""))
}

// words is a text without its line breaks and marks of lists.
func words(s string) string {
	s = regexp.MustCompile(`(?m)^\s*[*-] `).ReplaceAllString(s, "")
	return strings.Join(strings.Fields(s), " ")
}
