package prometheus_test

import (
	"encoding/json"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"
)

// serverVar has the URL of a Prometheus that scrapes a fleet, or mettle dual, which
// has had some minutes of work: ../MONITORING.md says how.
const serverVar = "METTLE_TEST_PROMETHEUS"

// TestServer asks a real Prometheus what each alert and each panel asks. No alert
// fires where all is well; which panels have no data is told.
func TestServer(t *testing.T) {
	if os.Getenv(serverVar) == "" {
		t.Skip(serverVar + " names no server")
	}
	var rules struct {
		Groups []struct{ Rules []rule }
	}
	readYAML(t, "alerts.yaml", &rules)
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			if found := ask(t, r.Expr); len(found) > 0 {
				t.Errorf("%s would fire: %s", r.Alert, found)
			}
		}
	}
	data, err := os.ReadFile("../grafana/mettle.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct{ Panels []panel }
	if err := json.Unmarshal(data, &dashboard); err != nil {
		t.Fatal(err)
	}
	empty, all := 0, 0
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			all++
			expr := strings.NewReplacer("$__rate_interval", "5m", "$pool", ".*", "$instance", ".*").Replace(target.Expr)
			if len(ask(t, expr)) == 0 {
				empty++
				t.Logf("%s: no data for %s", p.Title, target.Expr)
			}
		}
	}
	t.Logf("%d of %d queries have no data", empty, all)
	if empty > all/2 {
		t.Errorf("most panels have no data: does it scrape a fleet?")
	}
}

// ask is what an expression gives now.
func ask(t *testing.T, expr string) []json.RawMessage {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet,
		strings.TrimSuffix(os.Getenv(serverVar), "/")+"/api/v1/query?query="+url.QueryEscape(expr), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var answer struct {
		Status, Error string
		Data          struct{ Result []json.RawMessage }
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || answer.Status != "success" {
		t.Errorf("%s: %v, %s", expr, err, answer.Error)
	}
	return answer.Data.Result
}
