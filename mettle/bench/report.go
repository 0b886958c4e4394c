package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Report is what a run found: what the JSON holds and the table shows.
type Report struct {
	Remote          string    `json:"remote"`
	Instance        string    `json:"instance"`
	DigestFunction  string    `json:"digest_function"`
	Started         time.Time `json:"started"`
	DurationSeconds float64   `json:"duration_seconds"` // of each measurement
	Machine         Machine   `json:"machine"`
	Results         []Result  `json:"results"`
	// Interrupted: the run was stopped, and the last result may be of less
	// than its time.
	Interrupted bool `json:"interrupted,omitempty"`
}

// Machine is where the load generator ran.
type Machine struct {
	CPUs int    `json:"cpus"`
	OS   string `json:"os"`
	Arch string `json:"arch"`
	Go   string `json:"go"`
}

// Result is one measurement.
type Result struct {
	Subject string `json:"subject"`
	Case    string `json:"case"`
	Clients int    `json:"clients"` // at once
	// Skipped says why there are no figures: the server does not offer this.
	Skipped string `json:"skipped,omitempty"`

	Value     float64  `json:"value"` // in Unit
	Unit      string   `json:"unit"`
	Ops       uint64   `json:"ops"` // that succeeded
	Seconds   float64  `json:"seconds"`
	LatencyMS *Latency `json:"latency_ms,omitempty"` // of one op

	// HandOffMS is how long jobs waited for a worker, of the subject fleet only.
	HandOffMS *Latency `json:"hand_off_ms,omitempty"`

	// QuietLatencyMS is LatencyMS before the flood, FloodCalls how many calls that had
	// at once, and FloodStatuses how those ended that did; of the subject load only.
	QuietLatencyMS *Latency          `json:"quiet_latency_ms,omitempty"`
	FloodCalls     int               `json:"flood_calls,omitempty"`
	FloodStatuses  map[string]uint64 `json:"flood_statuses,omitempty"`

	// OverheadMS is what an action took on its worker without the command itself,
	// by the timestamps in its metadata; nil where it has none.
	OverheadMS *Latency `json:"overhead_ms,omitempty"`

	Errors     uint64 `json:"errors"`
	FirstError string `json:"first_error,omitempty"`

	// Floor is what the machine allowed in the same time, and Share the part
	// of its median that was reached.
	Floor *FloorResult `json:"floor,omitempty"`
	Share float64      `json:"share,omitempty"`
	// OverFloorP50MS is how much longer than the floor's op the median op took.
	OverFloorP50MS float64 `json:"over_floor_p50_ms,omitempty"`

	ClientCPUMS float64      `json:"client_cpu_ms_per_op"` // of this process
	Server      *ServerUsage `json:"server,omitempty"`
}

// FloorResult is the floor of a measurement, of the samples around its slices.
type FloorResult struct {
	Name      string    `json:"name"`
	Value     float64   `json:"value"` // median of Samples
	Unit      string    `json:"unit"`
	Samples   []float64 `json:"samples"`
	LatencyMS *Latency  `json:"latency_ms,omitempty"`
}

// Latency is a distribution of latencies, in milliseconds.
type Latency struct {
	P50 float64 `json:"p50"`
	P90 float64 `json:"p90"`
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`
}

// ServerUsage is what the server used, where it was asked for.
type ServerUsage struct {
	CPUMS         float64 `json:"cpu_ms_per_op"`                    // of the server itself
	ChildrenCPUMS float64 `json:"children_cpu_ms_per_op,omitempty"` // of the actions, by process id only
	RSSBytes      float64 `json:"rss_bytes"`                        // at the end
	// RSSBeforeBytes is what there was before, of the subject load only.
	RSSBeforeBytes float64 `json:"rss_before_bytes,omitempty"`
	// PeakRSSBytes is the most that was seen, of the subjects memory and load only.
	PeakRSSBytes float64 `json:"peak_rss_bytes,omitempty"`
	// Goroutines, by metrics only, before the measurement and after it.
	GoroutinesBefore float64 `json:"goroutines_before,omitempty"`
	GoroutinesAfter  float64 `json:"goroutines_after,omitempty"`
	// Descriptors are those that the processes had open, by process id or metrics.
	DescriptorsBefore float64 `json:"descriptors_before,omitempty"`
	DescriptorsAfter  float64 `json:"descriptors_after,omitempty"`
	// Files, with directories, are those below the directories that were asked for.
	FilesBefore float64 `json:"files_before,omitempty"`
	FilesAfter  float64 `json:"files_after,omitempty"`
	Error       string  `json:"error,omitempty"` // why the rest is not known
}

func latencyOf(h *histogram) *Latency {
	return &Latency{P50: ms(h.quantile(0.5)), P90: ms(h.quantile(0.9)), P99: ms(h.quantile(0.99)), Max: ms(h.max)}
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// err is nil where nothing failed.
func (r *Report) err() error {
	var n uint64
	var first string
	for _, res := range r.Results {
		n += res.Errors
		if first == "" && res.FirstError != "" {
			first = fmt.Sprintf("%s %s, clients: %d: %s", res.Subject, res.Case, res.Clients, res.FirstError)
		}
	}
	if n == 0 {
		return nil
	}
	return fmt.Errorf("%d %w, the first: %s", n, ErrCallsFailed, first)
}

func (r *Report) write(w io.Writer, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	return r.writeTable(w)
}

// writeTable shows each result on a line; columns that no result has are left out.
func (r *Report) writeTable(w io.Writer) error {
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	cols := r.columns()
	for _, c := range cols {
		_, _ = fmt.Fprint(t, c.head, "\t") // a Builder takes everything
	}
	_, _ = fmt.Fprintln(t)
	for i := range r.Results {
		for _, c := range cols {
			_, _ = fmt.Fprint(t, c.cell(&r.Results[i]), "\t")
		}
		_, _ = fmt.Fprintln(t)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(&b, "\n%d CPUs, %s, %.3g s each; times in ms; share: of the floor's median in the same run\n",
		r.Machine.CPUs, r.Machine.Go, r.DurationSeconds)
	for _, res := range r.Results {
		head := fmt.Sprintf("%s %s, clients: %d:", res.Subject, res.Case, res.Clients)
		if res.Subject == "latency" && res.LatencyMS != nil && res.Floor != nil {
			fmt.Fprintf(&b, "%s p50 is %.2f ms, %.2f ms over the floor's\n", head, res.LatencyMS.P50, res.OverFloorP50MS)
		}
		if res.FloodCalls > 0 {
			fmt.Fprintf(&b, "%s quiet p50 was %.2f ms; the flood's calls that ended: %s\n", head, res.QuietLatencyMS.P50, statuses(res.FloodStatuses))
		}
		if res.Skipped != "" {
			fmt.Fprintf(&b, "%s %s\n", head, res.Skipped)
		}
		if res.Errors > 0 {
			fmt.Fprintf(&b, "%s %d failed, the first: %s\n", head, res.Errors, res.FirstError)
		}
		if res.Server != nil && res.Server.Error != "" {
			fmt.Fprintf(&b, "%s the server's use is not known: %s\n", head, res.Server.Error)
		}
	}
	if r.Interrupted {
		b.WriteString("interrupted: this is what was measured until then\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

type column struct {
	head string
	cell func(*Result) string
}

func (r *Report) columns() []column {
	number := func(format string, get func(*Result) float64) func(*Result) string {
		return func(res *Result) string {
			if v := get(res); v != 0 {
				return fmt.Sprintf(format, v)
			}
			return "-"
		}
	}
	latency := func(get func(*Latency) float64) func(*Result) string {
		return number("%.2f", func(res *Result) float64 {
			if res.LatencyMS == nil {
				return 0
			}
			return get(res.LatencyMS)
		})
	}
	cols := []column{
		{"subject", func(res *Result) string { return res.Subject }},
		{"case", func(res *Result) string { return res.Case }},
		{"clients", func(res *Result) string { return fmt.Sprint(res.Clients) }},
		{"rate", func(res *Result) string {
			if res.Ops == 0 {
				return "-"
			}
			return figure(res.Value)
		}},
		{"unit", func(res *Result) string { return res.Unit }},
		{"share", number("%.3f", func(res *Result) float64 { return res.Share })},
		{"floor", func(res *Result) string {
			if res.Floor == nil {
				return "-"
			}
			return figure(res.Floor.Value) + " " + res.Floor.Name
		}},
		{"p50", latency(func(l *Latency) float64 { return l.P50 })},
		{"p90", latency(func(l *Latency) float64 { return l.P90 })},
		{"p99", latency(func(l *Latency) float64 { return l.P99 })},
		{"max", latency(func(l *Latency) float64 { return l.Max })},
		{"client cpu", number("%.3f", func(res *Result) float64 { return res.ClientCPUMS })},
	}
	for _, c := range serverColumns(number) {
		for i := range r.Results {
			if c.cell(&r.Results[i]) != "-" {
				cols = append(cols, c)
				break
			}
		}
	}
	return append(cols, column{"errors", func(res *Result) string { return fmt.Sprint(res.Errors) }})
}

func serverColumns(number func(string, func(*Result) float64) func(*Result) string) []column {
	server := func(format string, get func(*ServerUsage) float64) func(*Result) string {
		return number(format, func(res *Result) float64 {
			if res.Server == nil {
				return 0
			}
			return get(res.Server)
		})
	}
	latency := func(of func(*Result) *Latency, get func(*Latency) float64) func(*Result) string {
		return number("%.3f", func(res *Result) float64 {
			if l := of(res); l != nil {
				return get(l)
			}
			return 0
		})
	}
	handOff := func(res *Result) *Latency { return res.HandOffMS }
	overhead := func(res *Result) *Latency { return res.OverheadMS }
	return []column{
		{"hand-off p50", latency(handOff, func(l *Latency) float64 { return l.P50 })},
		{"p99", latency(handOff, func(l *Latency) float64 { return l.P99 })},
		{"overhead p50", latency(overhead, func(l *Latency) float64 { return l.P50 })},
		{"p99", latency(overhead, func(l *Latency) float64 { return l.P99 })},
		{"server cpu", server("%.3f", func(s *ServerUsage) float64 { return s.CPUMS })},
		{"children cpu", server("%.3f", func(s *ServerUsage) float64 { return s.ChildrenCPUMS })},
		{"rss before", server("%.1f", func(s *ServerUsage) float64 { return s.RSSBeforeBytes / mib })},
		{"rss MiB", server("%.1f", func(s *ServerUsage) float64 { return s.RSSBytes / mib })},
		{"peak rss MiB", server("%.1f", func(s *ServerUsage) float64 { return s.PeakRSSBytes / mib })},
		{"goroutines before", server("%.0f", func(s *ServerUsage) float64 { return s.GoroutinesBefore })},
		{"after", server("%.0f", func(s *ServerUsage) float64 { return s.GoroutinesAfter })},
		{"descriptors before", server("%.0f", func(s *ServerUsage) float64 { return s.DescriptorsBefore })},
		{"after", server("%.0f", func(s *ServerUsage) float64 { return s.DescriptorsAfter })},
		{"files before", server("%.0f", func(s *ServerUsage) float64 { return s.FilesBefore })},
		{"after", server("%.0f", func(s *ServerUsage) float64 { return s.FilesAfter })},
	}
}

// figure shows four digits, and never powers of ten.
func figure(v float64) string {
	if v >= 1000 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.4g", v)
}

// statuses are those of calls and how many had each.
func statuses(counts map[string]uint64) string {
	if len(counts) == 0 {
		return "none"
	}
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(counts)) {
		parts = append(parts, fmt.Sprintf("%d %s", counts[name], name))
	}
	return strings.Join(parts, ", ")
}
