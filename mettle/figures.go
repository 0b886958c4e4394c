package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/mettle-build/mettle/metrics"
)

// What the index page says of actions, from the metrics.

// counted is what a counter has by its only label.
func counted(f *dto.MetricFamily) string {
	var parts []string
	for _, m := range f.GetMetric() {
		if n := m.GetCounter().GetValue(); n > 0 && len(m.GetLabel()) > 0 {
			parts = append(parts, fmt.Sprintf("%s %.0f", strings.ReplaceAll(m.GetLabel()[0].GetValue(), "_", " "), n))
		}
	}
	if len(parts) == 0 {
		return "none yet"
	}
	return strings.Join(parts, ", ")
}

// mean is what was observed on average; false: nothing was.
func mean(m *dto.Metric) (string, bool) {
	h := m.GetHistogram()
	if h.GetSampleCount() == 0 {
		return "", false
	}
	d := time.Duration(h.GetSampleSum() / float64(h.GetSampleCount()) * float64(time.Second))
	unit := time.Microsecond
	if d > time.Second {
		unit = 10 * time.Millisecond
	}
	return fmt.Sprintf("%v on average, of %d", d.Round(unit), h.GetSampleCount()), true
}

// actionTables are those of a process that takes actions, or runs them.
func actionTables(g prometheus.Gatherer) ([]metrics.Table, error) {
	list, err := g.Gather()
	if err != nil {
		return nil, fmt.Errorf("gather metrics: %w", err)
	}
	families := make(map[string]*dto.MetricFamily, len(list))
	for _, f := range list {
		families[f.GetName()] = f
	}
	var tables []metrics.Table
	for _, t := range []struct {
		title string
		rows  []figure
	}{
		{"Execute calls", []figure{
			{"mettle_executes_total", "Ended", "of calls, by outcome"},
			{"mettle_executes_refused_total", "Refused", "by reason"},
			{"mettle_execute_accept_seconds", "At the door", "until answered from the cache, or queued"},
			{"mettle_publish_seconds", "Given to the broker", ""},
		}},
		{"Jobs on this worker", []figure{
			{"mettle_worker_actions_total", "Ended", "by outcome"},
			{"mettle_worker_queue_wait_seconds", "In the queue", "since their clients asked"},
			{"mettle_worker_stage_duration_seconds", "", "of a job's time here"},
			{"mettle_worker_overhead_seconds", "Beside the command", "all of it, and what comes after"},
			{"mettle_worker_lease_wait_seconds", "Slots waited", "for a job, until they had one"},
		}},
	} {
		var rows []metrics.Row
		for _, f := range t.rows {
			if family := families[f.metric]; family != nil {
				rows = append(rows, f.of(family)...)
			}
		}
		if len(rows) > 0 {
			tables = append(tables, metrics.Table{Title: t.title, Rows: rows})
		}
	}
	return tables, nil
}

// figure is how a metric is told to people.
type figure struct{ metric, name, note string }

// of is a row for a counter, and one for each series of a histogram.
func (f figure) of(family *dto.MetricFamily) (rows []metrics.Row) {
	if family.GetType() == dto.MetricType_COUNTER {
		return []metrics.Row{{Name: f.name, Value: counted(family), Note: f.note}}
	}
	for _, m := range family.GetMetric() {
		value, ok := mean(m)
		if !ok {
			continue
		}
		name := f.name
		for _, l := range m.GetLabel() {
			name = strings.TrimPrefix(name+", "+strings.ReplaceAll(l.GetValue(), "_", " "), ", ")
		}
		rows = append(rows, metrics.Row{Name: name, Value: value, Note: f.note})
	}
	return rows
}
