package deploy_test

import (
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/proto/releases"
)

// TestUpgrades_markers: each marker that UPGRADES.md names is in the file that it
// names, so that who changes one says there what becomes of what is stored.
func TestUpgrades_markers(t *testing.T) {
	rows := regexp.MustCompile("(?m)^\\| [^|]+ \\| `([^`]+)` in \\[[^]]+\\]\\(([^)]+)\\)").FindAllStringSubmatch(string(read(t, "UPGRADES.md")), -1)
	if len(rows) < 8 {
		t.Fatalf("only %d rows with a marker are found", len(rows))
	}
	for _, row := range rows {
		if text := string(read(t, row[2])); !strings.Contains(text, row[1]) {
			t.Errorf("%s has no %s: has the form changed? Say in UPGRADES.md what becomes of the older one", row[2], row[1])
		}
	}
}

// TestUpgrades_releases: each release that is recorded somewhere has a row, and the
// last one's stores and queues are recorded, too.
func TestUpgrades_releases(t *testing.T) {
	names, err := releases.Names()
	if err != nil || len(names) == 0 {
		t.Fatalf("releases %v, %v", names, err)
	}
	text := string(read(t, "UPGRADES.md"))
	for _, name := range names {
		if !regexp.MustCompile(`(?m)^\| ` + regexp.QuoteMeta(name) + `[ |]`).MatchString(text) {
			t.Errorf("UPGRADES.md has no row of release %s", name)
		}
	}
	for _, dir := range recordedIn(t) {
		found, err := filepath.Glob("../" + dir + "/testdata/releases/" + names[len(names)-1] + ".*")
		if err != nil || len(found) == 0 {
			t.Errorf("%s has no record of release %s: %v", dir, names[len(names)-1], err)
		}
	}
}

// recordedIn are the packages that record something beside messages, by the command
// in UPGRADES.md, which has to name all of them.
func recordedIn(t *testing.T) []string {
	t.Helper()
	have, err := filepath.Glob("../*/testdata/releases")
	for _, pattern := range []string{"../*/*/testdata/releases", "../*/*/*/testdata/releases"} {
		more, globErr := filepath.Glob(pattern)
		if have = append(have, more...); err == nil {
			err = globErr
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	command := regexp.MustCompile(`(?m)^for p in ([^;]*); do`).FindStringSubmatch(string(read(t, "UPGRADES.md")))
	if command == nil {
		t.Fatal("UPGRADES.md does not say how a release is recorded")
	}
	var named []string
	for name := range strings.FieldsSeq(command[1]) {
		if name != "./proto/releases" {
			named = append(named, strings.TrimPrefix(name, "./"))
		}
	}
	for _, dir := range have {
		if !slices.Contains(named, strings.TrimSuffix(strings.TrimPrefix(dir, "../"), "/testdata/releases")) {
			t.Errorf("UPGRADES.md does not say that %s is recorded", dir)
		}
	}
	return named
}
