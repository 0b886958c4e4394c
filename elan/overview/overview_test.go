package overview_test

import (
	"encoding/json"
	"errors"
	"flag"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/overview"
	"github.com/mettle-build/mettle/metrics"
)

var update = flag.Bool("update", false, "rewrite testdata/storage.json")

func newOverview(t *testing.T, g prometheus.Gatherer) *overview.Overview {
	t.Helper()
	o, err := overview.New(overview.Options{Gatherer: g})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// set registers a gauge with a value. The labels are pairs.
func set(reg *prometheus.Registry, name string, value float64, labels ...string) {
	l := prometheus.Labels{}
	for i := 0; i < len(labels); i += 2 {
		l[labels[i]] = labels[i+1]
	}
	g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: "A test's.", ConstLabels: l})
	g.Set(value)
	reg.MustRegister(g)
}

// figures are what two tiers and a bucket behind them would count.
func figures() *prometheus.Registry {
	reg := prometheus.NewRegistry()
	set(reg, "elan_cas_reads_total", 30, "result", "hit")
	set(reg, "elan_cas_reads_total", 10, "result", "miss")
	set(reg, "elan_cas_reads_total", 2, "result", "error")
	set(reg, "elan_action_cache_gets_total", 0, "result", "hit")
	set(reg, "elan_action_cache_dropped_total", 3)
	set(reg, "elan_file_store_used_bytes", 1<<30)
	set(reg, "elan_file_store_max_bytes", math.MaxInt64)
	set(reg, "elan_file_store_files", 1234567)
	set(reg, "elan_file_store_min_lifetime_seconds", 10800)
	set(reg, "elan_file_store_youngest_evicted_age_seconds", 10799)
	set(reg, "elan_file_store_eviction_age_seconds", math.Inf(1))
	set(reg, "elan_file_store_scrub_last_pass_timestamp_seconds", 1e9)
	set(reg, "elan_mem_store_used_bytes", 5, "store", "memory")
	set(reg, "elan_mem_store_max_bytes", 10, "store", "memory")
	set(reg, "elan_store_calls_total", 7, "store", "memory", "call", "open", "outcome", "ok")
	set(reg, "elan_store_calls_total", 1, "store", "memory", "call", "open", "outcome", "not_found")
	set(reg, "elan_store_calls_total", 1, "store", "memory", "call", "open", "outcome", "cancelled")
	set(reg, "elan_store_calls_total", 99, "store", "memory", "call", "find", "outcome", "ok")
	set(reg, "elan_gcs_store_requests_total", 4, "op", "get", "result", "ok")
	set(reg, "elan_gcs_store_requests_total", 5, "op", "stat", "result", "ok")
	set(reg, "somebody_else_file_store_used_bytes", 1)
	return reg
}

func get(t *testing.T, o *overview.Overview) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	o.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/storage.json", nil))
	return w
}

// TestOverview_schema: the names and units of the fields are a promise.
func TestOverview_schema(t *testing.T) {
	w := get(t, newOverview(t, figures()))
	var got map[string]any
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || w.Header().Get("Content-Type") != "application/json" {
		t.Fatalf("%v, %s", err, w.Header().Get("Content-Type"))
	}
	if got["taken_at"] == nil {
		t.Error("taken_at is absent")
	}
	delete(got, "taken_at")
	text, err := json.MarshalIndent(got, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "storage.json")
	if *update {
		if err := os.WriteFile(golden, append(text, '\n'), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.TrimSpace(string(want)), string(text)); diff != "" {
		t.Errorf("(-testdata/storage.json +got)\n%s", diff)
	}
}

func TestOverview_Tables(t *testing.T) {
	tables, err := newOverview(t, figures()).Tables(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []metrics.Table{
		{Title: "What is asked for", Rows: []metrics.Row{
			{Name: "Blobs read", Value: "75.0 % there, of 40; 2 failed"},
			{Name: "Action results looked up", Value: "none yet"},
			{Name: "Results dropped", Value: "3", Note: "blobs of theirs were gone"},
		}},
		{Title: "Store file", Rows: []metrics.Row{
			{Name: "Used", Value: "1.0 GiB"},
			{Name: "Blobs and results", Value: "about 1,234,567"},
			{Name: "Lifetime promised", Value: "3h0m0s", Note: "after each use"},
			{Name: "Youngest evicted", Value: "2h59m59s unused", Note: "the contract is BROKEN"},
			{Name: "All verified", Value: "2001-09-09T01:46:40Z"},
		}},
		{Title: "Store gcs", Rows: []metrics.Row{{Name: "Requests to the bucket", Value: "9"}}},
		{Title: "Store memory", Rows: []metrics.Row{
			{Name: "Used", Value: "5 B of 10 B", Note: "50 %"},
			{Name: "Blobs read", Value: "87.5 % there, of 8; 1 failed"},
		}},
	}
	if diff := cmp.Diff(want, tables); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// TestOverview_Tables_storesOnly: where nothing is counted, nothing is told.
func TestOverview_Tables_storesOnly(t *testing.T) {
	o, err := overview.New(overview.Options{Gatherer: figures(), StoresOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	tables, err := o.Tables(t.Context())
	if err != nil || len(tables) != 3 || tables[0].Title != "Store file" {
		t.Errorf("%d tables, %v: %+v, want those of the three stores", len(tables), err, tables)
	}
}

// TestOverview_of_a_real_store: the names of the metrics are those that there are.
func TestOverview_of_a_real_store(t *testing.T) {
	reg := prometheus.NewRegistry()
	s, err := mem.New(mem.Options{MaxBytes: 10_000, Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	actions, err := action.New(action.Options{Store: s, Entries: s, Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := blob.PutBytes(t.Context(), s, digest.SHA256, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, err := blob.PutBytes(t.Context(), s, digest.SHA256, make([]byte, 9600)); !errors.Is(err, blob.ErrFull) {
		t.Fatal(err)
	}
	if _, err := actions.Get(t.Context(), blob.EntryKey{Action: digest.Of(digest.SHA256, []byte("a"))}); !errors.Is(err, blob.ErrNotFound) {
		t.Fatal(err)
	}
	got, err := newOverview(t, reg).Storage()
	if err != nil || len(got.Stores) != 1 {
		t.Fatalf("%+v, %v", got, err)
	}
	m := got.Stores[0]
	if m.Kind != "mem" || *m.UsedBytes < 5 || *m.MaxBytes != 10_000 || *m.Objects != 1 || *m.RefusedWritesTotal != 1 || *m.EvictedTotal != 0 ||
		*m.MinLifetimeSeconds != 10800 || m.YoungestEvictedAgeSeconds != nil {
		t.Errorf("the store: %+v", m)
	}
	if got.ActionCache.Misses != 1 || *got.ActionCache.Ratio != 0 || got.CASReads.Ratio != nil {
		t.Errorf("%+v", got)
	}
}

// broken is a Gatherer that fails.
type broken struct{}

func (broken) Gather() ([]*dto.MetricFamily, error) { return nil, errors.New("two of a name") }

func TestOverview_fails(t *testing.T) {
	if w := get(t, newOverview(t, broken{})); w.Code != http.StatusInternalServerError || !strings.Contains(w.Body.String(), "two of a name") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if _, err := overview.New(overview.Options{}); err == nil {
		t.Error("New without a Gatherer: no error")
	}
}
