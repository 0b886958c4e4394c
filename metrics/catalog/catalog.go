// Package catalog lists what a registry can export, with what has no value yet:
// name, type, labels and help of each metric. From it come the METRICS.md files
// of the programs, and the checks that hold their names, dashboards and alerts
// together. The tests of the programs use it, and no program does.
package catalog

import (
	"cmp"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
)

// Metric is one that a program exports.
type Metric struct {
	Name   string
	Type   string // counter, gauge, histogram or summary
	Labels []string
	Help   string
	// From are the programs that export it, as in "mettle dual".
	From []string
}

// Of lists the metrics of a program's registry, by name, without those of the Go
// runtime and the process. It reads what the registry has, and changes nothing.
func Of(program string, r *prometheus.Registry) ([]Metric, error) {
	types, err := gathered(r)
	if err != nil {
		return nil, err
	}
	collectors, err := vectors(r)
	if err != nil {
		return nil, err
	}
	descs := make(chan *prometheus.Desc)
	go func() {
		defer close(descs)
		r.Describe(descs)
	}()
	var all []Metric
	var errs []error
	for d := range descs { // to the end, so that the goroutine ends
		m, err := parse(d)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if standard(m.Name) {
			continue
		}
		m.From = []string{program}
		if m.Type = cmp.Or(types[m.Name], collectors[idOf(d)]); m.Type == "" {
			errs = append(errs, fmt.Errorf("%s has no value yet and a collector of its own, so that nobody knows its type", m.Name))
		}
		all = append(all, m)
	}
	slices.SortFunc(all, byName)
	return all, errors.Join(errs...)
}

func byName(a, b Metric) int { return cmp.Compare(a.Name, b.Name) }

// standard tells whether a metric is one of every Go program.
func standard(name string) bool {
	return strings.HasPrefix(name, "go_") || strings.HasPrefix(name, "process_")
}

// gathered are the types of the metrics that have a value.
func gathered(r prometheus.Gatherer) (map[string]string, error) {
	families, err := r.Gather()
	if err != nil {
		return nil, fmt.Errorf("gather metrics: %w", err)
	}
	types := make(map[string]string, len(families))
	for _, f := range families {
		types[f.GetName()] = strings.ToLower(f.GetType().String())
	}
	return types, nil
}

// vectors are the types of the collectors that have no value before a label has
// one, by the ID of the only Desc that such a collector has. The registry tells
// nobody, so this looks into it; TestOf fails where that is no longer possible.
func vectors(r *prometheus.Registry) (map[uint64]string, error) {
	inside := reflect.ValueOf(r).Elem().FieldByName("collectorsByID")
	if inside.Kind() != reflect.Map {
		return nil, errors.New("the registry keeps its collectors in another way now")
	}
	types := map[uint64]string{}
	for it := inside.MapRange(); it.Next(); {
		name := it.Value().Elem().Type().String()
		if kind, ok := strings.CutSuffix(name, "Vec"); ok {
			types[it.Key().Uint()] = strings.ToLower(strings.TrimPrefix(kind, "*prometheus."))
		}
	}
	return types, nil
}

func idOf(d *prometheus.Desc) uint64 { return reflect.ValueOf(d).Elem().FieldByName("id").Uint() }

var descPattern = regexp.MustCompile(`^Desc\{fqName: ("(?:[^"\\]|\\.)*"), help: ("(?:[^"\\]|\\.)*"),.* constLabels: \{(.*)\}, variableLabels: \{(.*)\}\}$`)

// parse reads what a Desc prints of itself: it has no other way to tell.
func parse(d *prometheus.Desc) (Metric, error) {
	s := d.String()
	f := descPattern.FindStringSubmatch(s)
	if f == nil {
		return Metric{}, fmt.Errorf("a description in another form: %s", s)
	}
	name, err := strconv.Unquote(f[1])
	if err != nil {
		return Metric{}, fmt.Errorf("the name in %s: %w", s, err)
	}
	help, err := strconv.Unquote(f[2])
	if err != nil {
		return Metric{}, fmt.Errorf("the help in %s: %w", s, err)
	}
	m := Metric{Name: name, Help: help}
	for l := range strings.SplitSeq(f[3], ",") {
		if label, _, ok := strings.Cut(l, "="); ok {
			m.Labels = append(m.Labels, label)
		}
	}
	for l := range strings.SplitSeq(f[4], ",") {
		if l != "" {
			m.Labels = append(m.Labels, l)
		}
	}
	return m, nil
}

// Merge makes one list, by name, of those of several programs, or of one that was
// started in several ways, in some of which a metric has a label more.
func Merge(lists ...[]Metric) ([]Metric, error) {
	var all []Metric
	var errs []error
	at := map[string]int{}
	for _, m := range slices.Concat(lists...) {
		i, ok := at[m.Name]
		if !ok {
			at[m.Name] = len(all)
			m.From = slices.Clone(m.From)
			all = append(all, m)
			continue
		}
		was := all[i]
		if len(m.Labels) > len(was.Labels) {
			all[i].Labels = m.Labels
		}
		if was.Type != m.Type || was.Help != m.Help || !within(was.Labels, m.Labels) && !within(m.Labels, was.Labels) {
			errs = append(errs, fmt.Errorf("%s is not the same everywhere: %v and %v", m.Name, was, m))
		}
		for _, p := range m.From {
			if !slices.Contains(all[i].From, p) {
				all[i].From = append(all[i].From, p)
			}
		}
	}
	slices.SortFunc(all, byName)
	return all, errors.Join(errs...)
}

// within tells whether all of labels are among more.
func within(labels, more []string) bool {
	return !slices.ContainsFunc(labels, func(l string) bool { return !slices.Contains(more, l) })
}

// Lint says what promlint finds wrong with metrics, whether they have values or
// not, and which labels are none of known: the labels whose values are from a
// bounded set, with what bounds each.
func Lint(all []Metric, known map[string]string) ([]string, error) {
	var found []string
	families := make([]*dto.MetricFamily, 0, len(all))
	for _, m := range all {
		f, err := family(m)
		if err != nil {
			return nil, err
		}
		families = append(families, f)
		for _, l := range m.Labels {
			if known[l] == "" {
				found = append(found, fmt.Sprintf("%s: nothing is known to bound the values of its label %s", m.Name, l))
			}
		}
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil {
		return nil, fmt.Errorf("lint metrics: %w", err)
	}
	for _, p := range problems {
		found = append(found, p.Metric+": "+p.Text)
	}
	return found, nil
}

// family is a metric as if it had a value.
func family(m Metric) (*dto.MetricFamily, error) {
	n, ok := dto.MetricType_value[strings.ToUpper(m.Type)]
	if !ok {
		return nil, fmt.Errorf("%s is of no known type: %q", m.Name, m.Type)
	}
	kind, value := dto.MetricType(n), &dto.Metric{}
	for i := range m.Labels {
		value.Label = append(value.Label, &dto.LabelPair{Name: &m.Labels[i], Value: new(string)})
	}
	switch kind {
	case dto.MetricType_COUNTER:
		value.Counter = &dto.Counter{}
	case dto.MetricType_HISTOGRAM:
		value.Histogram = &dto.Histogram{}
	case dto.MetricType_SUMMARY:
		value.Summary = &dto.Summary{}
	default:
		value.Gauge = &dto.Gauge{}
	}
	f := &dto.MetricFamily{Name: &m.Name, Type: &kind, Metric: []*dto.Metric{value}}
	if m.Help != "" {
		f.Help = &m.Help
	}
	return f, nil
}

// tableHead begins the table of Markdown.
const tableHead = "| Metric | Type | Labels | What | Of |\n|--|--|--|--|--|\n"

// Markdown is the metrics as a table.
func Markdown(all []Metric) string {
	var b strings.Builder
	b.WriteString(tableHead)
	for _, m := range all {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", m.Name, m.Type, strings.Join(m.Labels, ", "),
			strings.ReplaceAll(m.Help, "|", `\|`), strings.Join(m.From, ", "))
	}
	return b.String()
}

var rowPattern = regexp.MustCompile("^\\| `([a-z0-9_]+)` \\| (\\w+) \\| ([a-z0-9_, ]*) \\| (.*) \\| ([a-z, ]+) \\|$")

// ParseMarkdown reads what Markdown wrote, in a file with other text.
func ParseMarkdown(text string) []Metric {
	var all []Metric
	for line := range strings.Lines(text) {
		f := rowPattern.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if f == nil {
			continue
		}
		m := Metric{Name: f[1], Type: f[2], Help: strings.ReplaceAll(f[4], `\|`, "|"), From: strings.Split(f[5], ", ")}
		if f[3] != "" {
			m.Labels = strings.Split(f[3], ", ")
		}
		all = append(all, m)
	}
	return all
}

// Labels are those of our metrics, with what bounds the values of each. A label
// that is new needs a line here.
func Labels() map[string]string {
	return map[string]string{
		"by":        "memory or store",
		"call":      "calls of a store, or requests to the broker, by kind: constants",
		"class":     "classes of a broker's failures: constants",
		"code":      "status codes of gRPC",
		"direction": "read or written, sent or received",
		"form":      "forms of stored blobs: constants",
		"how":       "how a log stream ended, what became of a call, how an input came: constants",
		"isolation": "ways of running actions: constants",
		"kind":      "kinds of assets: constants",
		"method":    "methods of the services that there are; 128 at most, then other",
		"op":        "operations on a bucket: constants",
		"outcome":   "outcomes: constants of each metric",
		"pool":      "pools that operators made",
		"process":   "new or reused",
		"reason":    "reasons: constants of each metric",
		"result":    "results: constants of each metric",
		"service":   "services that there are; as method",
		"stage":     "stages of an operation or of an action: constants",
		"state":     "states of a worker: constants",
		"store":     "stores of a storage, which operators make",
		"use":       "what a file of credentials is for: constants of the mains",
		"way":       "ways of reading what is compressed: constants",
		"tier":      "tiers of a storage, which operators make",
	}
}
