package mettle_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
)

var (
	fencePattern   = regexp.MustCompile("(?ms)^```.*?^```")
	linkPattern    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	headingPattern = regexp.MustCompile(`(?m)^#{1,6} +(.+?)\s*$`)
)

// TestDocs_links: what one page says of another is there, down to the heading.
func TestDocs_links(t *testing.T) {
	links := 0
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == ".git" || d.Name() == "bin" || d.Name() == "testdata"):
			return fs.SkipDir
		case filepath.Ext(path) != ".md":
			return nil
		}
		for _, m := range linkPattern.FindAllStringSubmatch(page(t, path), -1) {
			if link := m[1]; !strings.Contains(link, "://") && !strings.HasPrefix(link, "mailto:") {
				links++
				checkLink(t, path, link)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if links < 50 {
		t.Errorf("%d links found, which can't be all", links)
	}
}

// page is the file without what it quotes, which has brackets of its own.
func page(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return fencePattern.ReplaceAllString(string(b), "")
}

func checkLink(t *testing.T, from, link string) {
	t.Helper()
	file, anchor, _ := strings.Cut(link, "#")
	to := from
	if file != "" {
		to = filepath.Join(filepath.Dir(from), file)
	}
	if _, err := os.Stat(to); err != nil {
		t.Errorf("%s links %s: %v", from, link, err)
		return
	}
	if anchor == "" {
		return
	}
	var all []string
	for _, m := range headingPattern.FindAllStringSubmatch(page(t, to), -1) {
		all = append(all, slug(m[1]))
	}
	if !slices.Contains(all, anchor) {
		t.Errorf("%s links %s: the headings are %q", from, link, all)
	}
}

// slug is the name of a heading in links, as forges make it.
func slug(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
			return unicode.ToLower(r)
		}
		return -1
	}, heading)
}
