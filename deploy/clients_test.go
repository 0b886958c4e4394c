package deploy_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestClients holds CLIENTS.md to the tests that it names, and each of its lines to a
// word on whether it was tried.
func TestClients(t *testing.T) {
	text := string(read(t, "CLIENTS.md"))
	var tests strings.Builder
	files, err := filepath.Glob("../mettle/e2e/*_test.go")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d files of tests, %v", len(files), err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		tests.Write(data)
	}
	named := regexp.MustCompile("`(Test[A-Za-z_]+)(\\*?)`").FindAllStringSubmatch(text, -1)
	if len(named) < 10 {
		t.Errorf("only %d tests are named", len(named))
	}
	for _, m := range named {
		declaration := "func " + m[1]
		if m[2] == "" {
			declaration += "("
		}
		if !strings.Contains(tests.String(), declaration) {
			t.Errorf("CLIENTS.md names %s, which is no test of mettle/e2e", m[1])
		}
	}
	marked := regexp.MustCompile(`(?i)\*\*run\*\*|\*played\*|^read\b|^not served|[;.] read\b`)
	status := false
	for line := range strings.Lines(text) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		last := strings.TrimSpace(cells[len(cells)-1])
		switch {
		case !strings.HasPrefix(line, "|"):
			status = false
		case last == "Status":
			status = true
		case status && !strings.HasPrefix(line, "|--") && !marked.MatchString(last):
			t.Errorf("nothing tells whether it was tried: %s", line)
		}
	}
}
