// Package mettle_test holds the rules on the tree as a whole: which package may
// import which, where gRPC statuses are made, and that every package says what
// it is. It stands at the top because it belongs to no package more than to
// another, and has no code but tests. The same arrows are in .golangci.yml,
// which tells of them in the editor; here they are exact, package by package.
package mettle_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/mettle-build/mettle"

// arrows lists what of ours the code of a package, without its tests, may
// import. The pattern "a/..." stands for a and all below it. A package takes
// the longest key that matches. A new package needs a line here, on purpose.
//
//nolint:gochecknoglobals // an immutable table
var arrows = map[string][]string{
	"proto/...":       {},
	"metrics":         {"metrics/spans"},
	"metrics/...":     {},
	"metrics/tracing": {"metrics/spans"},
	"creds":           {"elan/digest", "elan/resource", "elan/wire"},
	"creds/...":       {},

	"elan/digest":              {},
	"elan/resource":            {"elan/digest"},
	"elan/blob":                {"elan/digest"},
	"elan/blob/...":            {"elan/digest", "elan/blob"}, // stores and decorators: each alone
	"elan/blob/file/...":       {"elan/digest", "elan/blob", "elan/blob/file/..."},
	"elan/blob/bucket/...":     {"elan/digest", "elan/blob", "elan/blob/bucket/...", "elan/blob/recent"},
	"elan/blob/gcs":            {"elan/digest", "elan/blob", "elan/blob/bucket"},
	"elan/blob/s3":             {"elan/digest", "elan/blob", "elan/blob/bucket"},
	"elan/blob/chunked":        {"elan/digest", "elan/blob", "elan/chunk"},
	"elan/blob/compressed":     {"elan/digest", "elan/blob", "elan/compress"},
	"elan/blob/observed":       {"elan/digest", "elan/blob", "metrics/spans"},
	"elan/blob/known":          {"elan/digest", "elan/blob", "elan/blob/recent"},
	"elan/blob/tiered":         {"elan/digest", "elan/blob", "elan/blob/recent"},
	"elan/blob/open":           {"elan/digest", "elan/blob/...", "elan/client", "elan/flags"},
	"elan/flags":               {"elan/action", "elan/gate", "metrics", "metrics/tracing", "creds"},
	"elan/gate":                {"elan/wire"},
	"elan/compress":            {"elan/digest"},
	"elan/logstream":           {"elan/resource"},
	"elan/wire":                {},
	"elan/tree":                {"elan/digest", "elan/blob"},
	"elan/inventory":           {"elan/digest", "elan/blob"},
	"elan/inventory/...":       {"elan/digest", "elan/blob", "elan/blob/mem", "elan/inventory"}, // its suite
	"elan/action":              {"elan/digest", "elan/blob", "elan/tree"},
	"elan/asset":               {"elan/digest", "elan/blob", "elan/tree"},
	"elan/status":              {"elan/digest", "elan/blob", "elan/tree", "elan/resource", "elan/action"},
	"elan/client":              {"elan/digest", "elan/blob", "elan/tree", "elan/resource", "elan/action", "elan/status", "elan/compress", "elan/wire", "elan/inventory", "proto/store"},
	"elan/relay":               {"elan/wire"},
	"elan/rpc":                 {"elan/digest", "elan/gate", "elan/blob", "elan/tree", "elan/resource", "elan/action", "elan/asset", "elan/logstream", "elan/status", "elan/compress", "elan/wire", "elan/inventory", "proto/store"},
	"elan/overview":            {"elan/flags", "metrics"},
	"elan/tool":                {"elan/digest", "elan/blob", "elan/tree", "elan/inventory"},
	"elan":                     {"elan/...", "metrics", "metrics/tracing", "creds"},
	"mettle/command":           {"elan/digest"},
	"mettle/history":           {},
	"mettle/operation":         {"elan/digest", "proto/..."},
	"mettle/platform":          {"mettle/queue", "proto/..."},
	"mettle/queue":             {"elan/digest", "proto/..."},
	"mettle/queue/...":         {"elan/digest", "mettle/queue", "proto/..."}, // brokers: each alone
	"mettle/queue/pubsub/...":  {"mettle/queue", "proto/..."},
	"mettle/queue/open":        {"mettle/queue/...", "proto/..."},
	"mettle/worker/hostile":    {},
	"mettle/worker/image":      {},
	"mettle/worker/runner":     {},
	"mettle/worker/runner/...": {"mettle/worker/runner", "mettle/worker/runner/helper", "mettle/worker/runner/seccomp", "mettle/worker/cgroup"}, // ways of running, and their suite
	"mettle/worker/cgroup":     {"mettle/worker/runner"},
	"mettle/queue/pubsub/pubsubtest/...": {
		"mettle/queue/pubsub/pubsubtest",
	},
	"mettle/worker/livelog":  {"elan/blob"},
	"mettle/worker/presence": {"mettle/queue", "mettle/platform", "proto/..."},
	"mettle/worker/inputroot": {
		"elan/digest", "elan/blob", "elan/tree", "mettle/command",
	},
	"mettle/worker/output": {
		"elan/digest", "elan/blob", "elan/tree", "mettle/command",
	},
	"mettle/worker/persistent": {
		"elan/digest", "elan/blob", "elan/tree", "mettle/command", "mettle/worker/inputroot", "mettle/worker/runner", "proto/persistent",
	},
	// The worker fills in a google.rpc.Status, by the table that there is, and
	// chooses the runner that this machine allows.
	"mettle/worker": {
		"elan/digest", "elan/blob", "elan/tree", "elan/action", "elan/status", "mettle/command", "mettle/queue", "mettle/platform", "metrics/spans",
		"mettle/worker/cgroup", "mettle/worker/image", "mettle/worker/inputroot", "mettle/worker/livelog", "mettle/worker/persistent", "mettle/worker/presence", "mettle/worker/runner/...", "mettle/worker/output", "proto/...",
	},
	"mettle/api": {
		"elan/digest", "elan/resource", "elan/blob", "elan/tree", "elan/action", "elan/status",
		"mettle/command", "mettle/history", "mettle/operation", "mettle/platform", "mettle/queue", "proto/...", "metrics/spans",
	},
	"mettle/noop":    {"mettle/queue", "proto/..."},
	"mettle/bench":   {"elan/digest"},
	"mettle/conform": {"elan/digest"},
	"mettle/doctor":  {"elan/digest", "elan/blob", "elan/status"},
	"mettle/e2e":     {"elan/...", "mettle/...", "proto/...", "metrics/...", "metrics", "creds/..."},
	"mettle":         {"elan/...", "mettle/...", "proto/...", "metrics", "metrics/tracing", "creds"},
}

// edges may import gRPC. Elsewhere errors wrap the classes of elan/blob.
//
//nolint:gochecknoglobals // an immutable table
var edges = []string{
	"elan", "elan/flags", "elan/gate", "elan/rpc", "elan/relay", "elan/client", "elan/status", "elan/wire", "mettle", "mettle/api", "mettle/bench", "mettle/conform", "mettle/doctor", "mettle/e2e", "metrics", "metrics/tracing", "metrics/tracing/tracingtest", "creds", "creds/credstest",
	"proto/store",
	"mettle/queue/pubsub", "mettle/queue/pubsub/pubsubtest", // Pub/Sub is called by gRPC, and a fake of it serves that
}

// apart lists packages that not even tests may bring together.
//
//nolint:gochecknoglobals // an immutable table
var apart = [][2]string{{"mettle/api", "mettle/worker/..."}, {"mettle/worker/...", "mettle/api"}, {"elan/...", "mettle/..."}}

// goFile is what the rules ask of one file.
type goFile struct {
	path, pkg string // relative to the module
	test      bool
	generated bool
	doc       string
	imports   []string
}

func TestImports_runOneWay(t *testing.T) {
	for _, f := range goFiles(t) {
		for _, path := range f.imports {
			ours, ok := strings.CutPrefix(path, module+"/")
			if !ok {
				continue
			}
			for _, a := range apart {
				if matches(a[0], f.pkg) && matches(a[1], ours) {
					t.Errorf("%s imports %s: these never meet", f.path, ours)
				}
			}
			if f.test {
				continue
			}
			allowed, ok := allowedImports(f.pkg)
			if !ok {
				t.Errorf("%s: package %s has no line in arrows", f.path, f.pkg)
				break
			}
			if !slices.ContainsFunc(allowed, func(p string) bool { return matches(p, ours) }) {
				t.Errorf("%s imports %s: no arrow goes there; %s may import %v", f.path, ours, f.pkg, allowed)
			}
		}
	}
}

func TestImports_grpcAtTheEdges(t *testing.T) {
	for _, f := range goFiles(t) {
		if f.test || slices.Contains(edges, f.pkg) {
			continue
		}
		for _, path := range f.imports {
			if strings.HasPrefix(path, "google.golang.org/grpc") {
				t.Errorf("%s imports %s: gRPC is spoken at the edges only, %v", f.path, path, edges)
			}
		}
	}
}

func TestPackages_sayWhatTheyAre(t *testing.T) {
	docs := map[string]string{}
	for _, f := range goFiles(t) {
		if f.test && f.pkg != "" { // the package here has nothing but tests
			continue
		}
		if f.generated {
			docs[f.pkg] = "generated"
		}
		if docs[f.pkg] == "" {
			docs[f.pkg] = f.doc
		}
	}
	if len(docs) < 10 {
		t.Fatalf("only %d packages found: is this the top of the module?", len(docs))
	}
	for pkg, doc := range docs {
		// A sentence or two at the least.
		if len(doc) < 60 && doc != "generated" {
			t.Errorf("package %q has no doc comment that says what it does, what it does not, and who calls it", pkg)
		}
	}
}

func TestMatches(t *testing.T) {
	for _, tc := range []struct {
		pattern, pkg string
		want         bool
	}{
		{"elan/blob", "elan/blob", true},
		{"elan/blob", "elan/blob/mem", false},
		{"elan/blob/...", "elan/blob", true},
		{"elan/blob/...", "elan/blob/mem", true},
		{"elan/blob/...", "elan/blobs", false},
		{"elan/...", "elan", true},
	} {
		if got := matches(tc.pattern, tc.pkg); got != tc.want {
			t.Errorf("matches(%q, %q) = %v, want %v", tc.pattern, tc.pkg, got, tc.want)
		}
	}
}

// allowedImports finds the line of arrows for a package.
func allowedImports(pkg string) ([]string, bool) {
	if exact, ok := arrows[pkg]; ok {
		return exact, true
	}
	best, found := "", false
	for key := range arrows {
		if matches(key, pkg) && (!found || len(strings.TrimSuffix(key, "...")) > len(strings.TrimSuffix(best, "..."))) {
			best, found = key, true
		}
	}
	return arrows[best], found
}

func matches(pattern, pkg string) bool {
	if below, ok := strings.CutSuffix(pattern, "/..."); ok {
		return pkg == below || strings.HasPrefix(pkg, below+"/")
	}
	return pattern == pkg
}

// goFiles parses the imports of every Go file of the module.
func goFiles(t *testing.T) []goFile {
	t.Helper()
	var files []goFile
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			// Modules of their own, outputs, and folders that go itself passes over.
			if path == filepath.Join("third_party", "tools") || path == filepath.Join("third_party", "layouts") || path == filepath.Join("third_party", "manifests") || name == "testdata" || name == "bin" || name == "plz-out" ||
				(path != "." && strings.HasPrefix(name, ".")) {
				return filepath.SkipDir
			}
			return nil
		}
		if strings.HasSuffix(name, ".go") {
			f, err := parseFile(path)
			if err != nil {
				return err
			}
			files = append(files, f)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func parseFile(path string) (goFile, error) {
	tree, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly|parser.ParseComments)
	if err != nil {
		return goFile{}, err
	}
	f := goFile{
		path: path, pkg: strings.TrimPrefix(filepath.ToSlash(filepath.Dir(path)), "."),
		test: strings.HasSuffix(path, "_test.go"), generated: ast.IsGenerated(tree), doc: tree.Doc.Text(),
	}
	for _, i := range tree.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		if err != nil {
			return goFile{}, err
		}
		f.imports = append(f.imports, p)
	}
	return f, nil
}
