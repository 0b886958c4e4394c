package prometheus_test

import (
	"maps"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"testing"

	"go.yaml.in/yaml/v3"
)

// alerts are the names of those in alerts.yaml.
func alerts(t *testing.T) []string {
	t.Helper()
	var file struct {
		Groups []struct{ Rules []struct{ Alert string } }
	}
	readYAML(t, "alerts.yaml", &file)
	var names []string
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			names = append(names, r.Alert)
		}
	}
	return names
}

func readYAML(t *testing.T, name string, to any) {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(data, to); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

// TestAlerts_cases sees that alerts_test.yaml makes each alert fire.
func TestAlerts_cases(t *testing.T) {
	var file struct {
		Tests []struct {
			Name   string
			Checks []struct {
				Samples []struct{ Labels string } `yaml:"exp_samples"`
			} `yaml:"promql_expr_test"`
		}
	}
	readYAML(t, "alerts_test.yaml", &file)
	fired := map[string]bool{}
	for _, test := range file.Tests {
		for _, c := range test.Checks {
			for _, s := range c.Samples {
				for _, m := range regexp.MustCompile(`alertname="(\w+)"`).FindAllStringSubmatch(s.Labels, -1) {
					fired[m[1]] = true
				}
			}
		}
	}
	for _, name := range alerts(t) {
		if !fired[name] {
			t.Errorf("no case of alerts_test.yaml makes %s fire", name)
		}
		delete(fired, name)
	}
	for _, name := range slices.Sorted(maps.Keys(fired)) {
		t.Errorf("a case of alerts_test.yaml waits for %s, which is no alert", name)
	}
}

// TestAlerts_promtool has Prometheus' own tool read the alerts, and run their cases.
func TestAlerts_promtool(t *testing.T) {
	tool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not installed: Debian's package prometheus has it")
	}
	for _, args := range [][]string{{"check", "rules", "alerts.yaml"}, {"test", "rules", "alerts_test.yaml"}} {
		if out, err := exec.CommandContext(t.Context(), tool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v: %s", args, err, out)
		}
	}
}
