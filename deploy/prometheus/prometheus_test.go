// Package prometheus_test holds the dashboard and the alerts to what the programs
// export, as their METRICS.md files list it, which tests of the programs hold to
// the programs themselves. It has no code but tests.
package prometheus_test

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/mettle-build/mettle/metrics"
	"github.com/mettle-build/mettle/metrics/catalog"
)

// exported are the labels of each name that a series can have, with those that
// Prometheus adds.
func exported(t *testing.T) map[string][]string {
	t.Helper()
	always := []string{"instance", "job"}
	names := map[string][]string{}
	for _, file := range []string{"../../elan/METRICS.md", "../../mettle/METRICS.md"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		list := catalog.ParseMarkdown(string(text))
		if len(list) == 0 {
			t.Errorf("%s lists no metric", file)
		}
		for _, m := range list {
			labels := slices.Concat(always, m.Labels)
			if m.Type != "histogram" {
				names[m.Name] = append(names[m.Name], labels...)
				continue
			}
			for _, suffix := range []string{"_sum", "_count"} {
				names[m.Name+suffix] = labels
			}
			names[m.Name+"_bucket"] = append(labels, "le")
		}
	}
	families, err := metrics.NewRegistry().Gather() // those of every Go program
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		names[f.GetName()] = append(slices.Clone(always), "quantile")
	}
	return names
}

// source is our code without tests, in which label values are written.
func source(t *testing.T) string {
	t.Helper()
	var b bytes.Buffer
	for _, dir := range []string{"../../elan", "../../mettle", "../../creds", "../../metrics"} {
		if err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			text, err := os.ReadFile(path)
			b.Write(text)
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

// checker holds expressions to what there is.
type checker struct {
	names  map[string][]string
	source string
}

func newChecker(t *testing.T) checker { return checker{names: exported(t), source: source(t)} }

// foreign are labels whose values are not of our code.
//
//nolint:gochecknoglobals // an immutable table
var foreign = []string{"code", "method", "pool", "instance", "quantile"}

// check returns what is wrong with an expression.
func (c checker) check(expr string) []string {
	u, err := parse(strings.ReplaceAll(expr, "$__rate_interval", "5m"))
	if err != nil {
		return []string{err.Error()}
	}
	var wrong, labels []string
	for _, m := range u.metrics {
		has, ok := c.names[m.name]
		if !ok {
			wrong = append(wrong, "nothing exports "+m.name)
		}
		labels = append(labels, has...)
		for _, match := range m.matchers {
			if !slices.Contains(has, match.label) {
				wrong = append(wrong, m.name+" has no label "+match.label)
			}
			for v := range strings.SplitSeq(match.value, "|") {
				if !slices.Contains(foreign, match.label) && !strings.Contains(c.source, `"`+v+`"`) {
					wrong = append(wrong, m.name+": nothing gives "+match.label+" the value "+v)
				}
			}
		}
	}
	for _, g := range u.groups {
		if !slices.Contains(labels, g) {
			wrong = append(wrong, "no metric of this has the label "+g)
		}
	}
	if len(u.metrics) == 0 {
		wrong = append(wrong, "no metric is named")
	}
	return wrong
}

func TestChecker(t *testing.T) {
	c := newChecker(t)
	for expr, sound := range map[string]bool{
		`sum by (pool) (mettle_pool_operations{stage="queued"})`:          true,
		`sum by (pool) (mettle_pool_operation{stage="queued"})`:           false,
		`sum by (pools) (mettle_pool_operations{stage="queued"})`:         false,
		`sum by (pool) (mettle_pool_operations{state="queued"})`:          false,
		`sum by (pool) (mettle_pool_operations{stage="never so named"})`:  false,
		`rate(mettle_worker_overhead_seconds[5m])`:                        false,
		`rate(mettle_worker_overhead_seconds_bucket{stage="queued"}[5m])`: false,
		`1`: false,
	} {
		if wrong := c.check(expr); (len(wrong) == 0) != sound {
			t.Errorf("%s: found %q", expr, wrong)
		}
	}
}

type rule struct {
	Alert, Expr, For    string
	Labels, Annotations map[string]string
}

func TestAlerts(t *testing.T) {
	data, err := os.ReadFile("alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Name  string
			Rules []rule
		}
	}
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	if err := d.Decode(&file); err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../MONITORING.md")
	if err != nil {
		t.Fatal(err)
	}
	c, seen := newChecker(t), map[string]bool{}
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			t.Run(r.Alert, func(t *testing.T) {
				if seen[r.Alert] {
					t.Error("it is there twice")
				}
				seen[r.Alert] = true
				for _, wrong := range c.check(r.Expr) {
					t.Error(wrong)
				}
				checkRule(t, r, string(page))
			})
		}
	}
	if len(seen) < 20 {
		t.Errorf("%d alerts, want those of all parts", len(seen))
	}
	for _, h := range regexp.MustCompile(`(?m)^### (.+)$`).FindAllStringSubmatch(string(page), -1) {
		if !seen[h[1]] {
			t.Errorf("MONITORING.md has %s, which is no alert", h[1])
		}
	}
}

var labelPattern = regexp.MustCompile(`\$labels\.(\w+)`)

func checkRule(t *testing.T, r rule, page string) {
	t.Helper()
	if !regexp.MustCompile(`^[0-9]+[smh]$`).MatchString(r.For) {
		t.Errorf("for: %q", r.For)
	}
	if !slices.Contains([]string{"critical", "warning", "info"}, r.Labels["severity"]) {
		t.Errorf("severity: %q", r.Labels["severity"])
	}
	if len(r.Annotations["summary"]) < 20 || len(r.Annotations["description"]) < 40 {
		t.Errorf("annotations %q say too little", r.Annotations)
	}
	anchor := "deploy/MONITORING.md#" + strings.ToLower(r.Alert)
	if !strings.HasSuffix(r.Annotations["runbook_url"], anchor) || !strings.Contains(page, "\n### "+r.Alert+"\n") {
		t.Errorf("runbook_url %q, want %s with a heading there", r.Annotations["runbook_url"], anchor)
	}
	for _, l := range labelPattern.FindAllStringSubmatch(r.Annotations["summary"]+r.Annotations["description"], -1) {
		// What is grouped away is empty in the text.
		if strings.Contains(r.Expr, " by (") && !regexp.MustCompile(`by \([^)]*\b`+l[1]+`\b`).MatchString(r.Expr) {
			t.Errorf("its text names the label %s, which the expression drops", l[1])
		}
	}
}

type panel struct {
	ID                       int
	Type, Title, Description string
	Datasource               struct{ UID string }
	GridPos                  struct{ X, Y, W, H int }
	Targets                  []struct{ RefID, Expr, LegendFormat string }
}

func TestDashboard(t *testing.T) {
	data, err := os.ReadFile("../grafana/mettle.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		SchemaVersion int
		Panels        []panel
		Templating    struct {
			List []struct {
				Name, Type, Definition string
			}
		}
	}
	if err := json.Unmarshal(data, &dashboard); err != nil {
		t.Fatal(err)
	}
	c := newChecker(t)
	var variables []string
	for _, v := range dashboard.Templating.List {
		variables = append(variables, v.Name)
		if f := regexp.MustCompile(`^label_values\((\w+), (\w+)\)$`).FindStringSubmatch(v.Definition); v.Type == "query" && (f == nil || !slices.Contains(c.names[f[1]], f[2])) {
			t.Errorf("variable %s asks for %q", v.Name, v.Definition)
		}
	}
	if want := []string{"datasource", "pool", "instance"}; !slices.Equal(variables, want) || dashboard.SchemaVersion < 36 {
		t.Errorf("variables %q of schema %d, want %q", variables, dashboard.SchemaVersion, want)
	}
	ids, places, rows := map[int]bool{}, map[[2]int]string{}, 0
	for _, p := range dashboard.Panels {
		if ids[p.ID] {
			t.Errorf("%s: its id is another's too", p.Title)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := places[[2]int{x, y}]; other != "" || x >= 24 {
					t.Fatalf("%s lies on %q or outside", p.Title, other)
				}
				places[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			rows++
			continue
		}
		t.Run(p.Title, func(t *testing.T) { c.checkPanel(t, p) })
	}
	if rows < 7 || len(dashboard.Panels) < 40 {
		t.Errorf("%d rows and %d panels, want those of all parts", rows, len(dashboard.Panels))
	}
}

func (c checker) checkPanel(t *testing.T, p panel) {
	t.Helper()
	if len(p.Description) < 60 || len(p.Targets) == 0 || p.Datasource.UID != "${datasource}" {
		t.Errorf("description %q, %d targets, data source %q", p.Description, len(p.Targets), p.Datasource.UID)
	}
	for _, target := range p.Targets {
		for _, wrong := range c.check(target.Expr) {
			t.Errorf("%s: %s", target.Expr, wrong)
		}
	}
}

var (
	namePattern    = regexp.MustCompile(`\b(?:mettle|elan|creds|process|go)_[a-z0-9_]+\b`)
	messagePattern = regexp.MustCompile(`msg="([^"]+)"`)
)

// What the pages for operators name is there: metrics, and the messages of log lines
// that they quote.
func TestPages(t *testing.T) {
	names, code := exported(t), source(t)
	for _, file := range []string{"../MONITORING.md", "../TROUBLESHOOTING.md"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		metrics := namePattern.FindAllString(string(text), -1)
		if len(metrics) < 20 {
			t.Errorf("%s names %d metrics, which can't be all", file, len(metrics))
		}
		for _, name := range metrics {
			if _, ok := names[name]; ok || names[name+"_bucket"] != nil {
				continue
			}
			if group := strings.TrimSuffix(name, "_"); group == name || !strings.Contains(string(text), name+"*") {
				t.Errorf("%s: nothing exports %s", file, name)
			}
		}
		for _, m := range messagePattern.FindAllStringSubmatch(string(text), -1) {
			if !strings.Contains(code, `"`+m[1]+`"`) {
				t.Errorf("%s quotes %q, which nobody logs", file, m[1])
			}
		}
	}
}
