package metrics

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// processTable tells of the process itself: how long it runs, what it takes, and
// until when its certificates are good.
func processTable(g prometheus.Gatherer, version string) (Table, error) {
	t := Table{Title: "Process"}
	if version != "" {
		t.Rows = append(t.Rows, Row{Name: "Version", Value: version})
	}
	families, err := g.Gather()
	if err != nil {
		return t, fmt.Errorf("gather metrics: %w", err)
	}
	now := time.Now()
	values := map[string]float64{}
	uses := map[string]*file{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			if of, ok := strings.CutPrefix(name, "creds_"); ok && len(m.GetLabel()) == 1 && m.GetLabel()[0].GetName() == "use" {
				use := m.GetLabel()[0].GetValue()
				if uses[use] == nil {
					uses[use] = &file{usable: true}
				}
				uses[use].take(of, m.GetGauge().GetValue())
				continue
			}
			values[name] += valueOf(m)
		}
	}
	if started, ok := values["process_start_time_seconds"]; ok {
		at := time.UnixMilli(int64(started * 1e3))
		t.Rows = append(t.Rows, Row{Name: "Runs for", Value: now.Sub(at).Round(time.Second).String(), Note: "since " + at.UTC().Format(time.DateTime) + " UTC"})
	}
	if b, ok := values["process_resident_memory_bytes"]; ok {
		t.Rows = append(t.Rows, Row{Name: "Memory", Value: fmt.Sprintf("%.0f MiB", b/(1<<20)), Note: "resident, without the processes of actions"})
	}
	if n, ok := values["process_open_fds"]; ok {
		t.Rows = append(t.Rows, Row{Name: "Open files", Value: fmt.Sprintf("%.0f of %.0f", n, values["process_max_fds"])})
	}
	t.Rows = append(t.Rows, Row{Name: "Goroutines", Value: fmt.Sprintf("%.0f", values["go_goroutines"])})
	for _, use := range sortedKeys(uses) {
		t.Rows = append(t.Rows, uses[use].row(use, now))
	}
	return t, nil
}

func valueOf(m *dto.Metric) float64 { return m.GetGauge().GetValue() + m.GetCounter().GetValue() }

func sortedKeys(m map[string]*file) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// file is what the metrics of package creds tell of one.
type file struct {
	usable        bool
	end, modified time.Time
}

func (f *file) take(metric string, v float64) {
	switch metric {
	case "file_usable":
		f.usable = v != 0
	case "file_modified_timestamp_seconds":
		f.modified = time.Unix(int64(v), 0)
	case "certificate_not_after_timestamp_seconds":
		f.end = time.Unix(int64(v), 0)
	}
}

func (f *file) row(use string, now time.Time) Row {
	r := Row{Name: "File for " + strings.ReplaceAll(use, "_", " "), Value: "in use"}
	if !f.modified.IsZero() {
		r.Note = "written " + f.modified.UTC().Format(time.DateOnly)
	}
	if !f.end.IsZero() {
		r.Value = fmt.Sprintf("good until %s, %.0f days", f.end.UTC().Format(time.DateOnly), f.end.Sub(now).Hours()/24)
		if !f.end.After(now) {
			r.Value = "has ended on " + f.end.UTC().Format(time.DateOnly)
		}
	}
	if !f.usable {
		r.Note = strings.TrimSpace("can't be used: what was read before stays. " + r.Note)
	}
	return r
}
