// Package overview tells what an operator, or a program that shows one what is
// going on, wants to know of a server's storage at a glance: how full the stores
// are, how often what is asked for is there, what was evicted, and whether the
// lifetime contract holds. It gathers that from the server's metrics, and counts
// nothing itself. The mains put it on the HTTP port: /storage.json has it for
// programs, as the type Storage, and the index page for people.
package overview

import (
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// SchemaVersion is that of Storage. Fields may come without another one; that one
// goes, or changes its meaning, makes another.
const SchemaVersion = 1

// Storage is what /storage.json answers. What is counted is counted since the
// server's start. What is not known is null.
type Storage struct {
	SchemaVersion int       `json:"schema_version"`
	TakenAt       time.Time `json:"taken_at"`
	// CASReads are the blobs that clients asked for, by ByteStream or in batches.
	CASReads Hits `json:"cas_reads"`
	// ActionCache are the results that were looked up, for clients and executions.
	ActionCache Hits `json:"action_cache"`
	// DroppedResultsTotal are the results that were found incomplete, and dropped.
	DroppedResultsTotal int64 `json:"dropped_results_total"`
	// Stores are those of the server, in the order of their names.
	Stores []Store `json:"stores"`
}

// Hits is how often what was asked for was there.
type Hits struct {
	Hits   int64 `json:"hits_total"`
	Misses int64 `json:"misses_total"`
	Errors int64 `json:"errors_total"`
	// Ratio is hits to hits and misses, from 0 to 1; null before the first.
	Ratio *float64 `json:"hit_ratio"`
}

// Store is one store: the only one, or a tier.
type Store struct {
	// Name tells the stores of a server apart.
	Name string `json:"name"`
	// Kind is file, mem, gcs or s3; empty for another.
	Kind string `json:"kind"`
	// UsedBytes is what the store takes, MaxBytes its bound (null: none but the
	// disk), and FreeDiskBytes what is free on its disk.
	UsedBytes     *int64 `json:"used_bytes"`
	MaxBytes      *int64 `json:"max_bytes"`
	FreeDiskBytes *int64 `json:"free_disk_bytes"`
	// Objects is how many blobs and entries there are, about.
	Objects *int64 `json:"objects_approximate"`
	// MinLifetimeSeconds is the lifetime that is promised after each use, and
	// YoungestEvictedAgeSeconds the time since the last use of whatever was
	// evicted earliest; null: nothing was. The contract is kept while it is the
	// larger. EvictionAgeSeconds is the same for the latest eviction alone: how
	// far back the store's size lets builds reach.
	MinLifetimeSeconds        *float64 `json:"min_lifetime_seconds"`
	YoungestEvictedAgeSeconds *float64 `json:"youngest_evicted_age_seconds"`
	EvictionAgeSeconds        *float64 `json:"eviction_age_seconds"`
	EvictedTotal              *int64   `json:"evicted_total"`
	EvictedBytesTotal         *int64   `json:"evicted_bytes_total"`
	// RefusedWritesTotal are the writes that the store had no room for.
	RefusedWritesTotal *int64 `json:"refused_writes_total"`
	CorruptTotal       *int64 `json:"corrupt_total"`
	// LastScrubAt is when all blobs had last been verified.
	LastScrubAt *time.Time `json:"last_scrub_at"`
	// Reads are the blobs that this store was asked to open; null where that is
	// not counted.
	Reads *Hits `json:"reads"`
	// BucketRequestsTotal are the attempts at requests of a store in a bucket.
	BucketRequestsTotal *int64 `json:"bucket_requests_total"`
}

// Options are those of New.
type Options struct {
	// Gatherer has the metrics, of the registry that all parts of the server
	// were given.
	Gatherer prometheus.Gatherer
	// StoresOnly is for servers that clients do not ask for blobs, or that pass
	// such calls on: Tables has no figures of those then.
	StoresOnly bool
}

// Overview gathers. It is safe for concurrent use.
type Overview struct {
	metrics    prometheus.Gatherer
	storesOnly bool
}

// New returns an Overview.
func New(o Options) (*Overview, error) {
	if o.Gatherer == nil {
		return nil, errors.New("overview: Options need a Gatherer")
	}
	return &Overview{metrics: o.Gatherer, storesOnly: o.StoresOnly}, nil
}

// Storage gathers the figures of this moment. What could be gathered comes also
// with an error.
func (o *Overview) Storage() (Storage, error) {
	families, err := o.metrics.Gather()
	g := gathering{stores: map[string]*Store{}}
	for _, f := range families {
		g.family(f)
	}
	g.out.SchemaVersion, g.out.TakenAt = SchemaVersion, time.Now().UTC()
	g.out.CASReads.rate()
	g.out.ActionCache.rate()
	g.out.Stores = []Store{}
	for _, s := range g.stores {
		if s.Reads != nil {
			s.Reads.rate()
		}
		g.out.Stores = append(g.out.Stores, *s)
	}
	slices.SortFunc(g.out.Stores, func(a, b Store) int { return strings.Compare(a.Name, b.Name) })
	return g.out, err //nolint:wrapcheck // it names the metric
}

// ServeHTTP implements http.Handler: it answers with a Storage as JSON.
func (o *Overview) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	s, err := o.Storage()
	w.Header().Set("Cache-Control", "no-store")
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(s) // the client may have gone
}

// rate computes the ratio.
func (h *Hits) rate() {
	if all := h.Hits + h.Misses; all > 0 {
		r := float64(h.Hits) / float64(all)
		h.Ratio = &r
	}
}

// gathering is a Storage that is being gathered.
type gathering struct {
	out    Storage
	stores map[string]*Store
}

// kinds are the stores' kinds, as they stand in the names of their metrics.
//
//nolint:gochecknoglobals // an immutable table
var kinds = []string{"file", "mem", "gcs", "s3"}

func (g *gathering) family(f *dto.MetricFamily) {
	name, ours := strings.CutPrefix(f.GetName(), "elan_")
	if !ours {
		return
	}
	for _, m := range f.GetMetric() {
		switch name {
		case "cas_reads_total":
			g.out.CASReads.add(label(m, "result"), value(m))
		case "action_cache_gets_total":
			g.out.ActionCache.add(label(m, "result"), value(m))
		case "action_cache_dropped_total":
			g.out.DroppedResultsTotal += int64(value(m))
		case "store_calls_total":
			g.observed(m)
		}
		for _, kind := range kinds {
			if figure, ok := strings.CutPrefix(name, kind+"_store_"); ok {
				g.store(storeName(m, kind), kind).figure(figure, value(m))
			}
		}
	}
}

// storeName is what tells the stores of one kind apart, where there are several.
func storeName(m *dto.Metric, kind string) string {
	for _, l := range []string{"store", "tier"} {
		if name := label(m, l); name != "" {
			return name
		}
	}
	return kind
}

func (g *gathering) store(name, kind string) *Store {
	s, ok := g.stores[name]
	if !ok {
		s = &Store{Name: name}
		g.stores[name] = s
	}
	if kind != "" {
		s.Kind = kind
	}
	return s
}

// observed takes a count of the decorator that observes stores: those of opening
// a blob.
func (g *gathering) observed(m *dto.Metric) {
	if label(m, "call") != "open" {
		return
	}
	s := g.store(label(m, "store"), "")
	if s.Reads == nil {
		s.Reads = &Hits{}
	}
	result := "error"
	switch label(m, "outcome") {
	case "ok":
		result = "hit"
	case "not_found":
		result = "miss"
	}
	s.Reads.add(result, value(m))
}

func (h *Hits) add(result string, n float64) {
	switch result {
	case "hit":
		h.Hits += int64(n)
	case "miss":
		h.Misses += int64(n)
	default:
		h.Errors += int64(n)
	}
}

// figure takes the figure of a store's metric with the name.
func (s *Store) figure(name string, v float64) {
	switch name {
	case "used_bytes":
		add(&s.UsedBytes, v)
	case "max_bytes":
		// Without a bound it is the largest number there is.
		if v < math.MaxInt64/2 {
			add(&s.MaxBytes, v)
		}
	case "free_bytes":
		add(&s.FreeDiskBytes, v)
	case "files", "items", "blobs", "packed":
		add(&s.Objects, v)
	case "min_lifetime_seconds":
		s.MinLifetimeSeconds = &v
	case "youngest_evicted_age_seconds":
		s.YoungestEvictedAgeSeconds = finite(v)
	case "eviction_age_seconds":
		s.EvictionAgeSeconds = finite(v)
	case "evicted_total":
		add(&s.EvictedTotal, v)
	case "evicted_bytes_total":
		add(&s.EvictedBytesTotal, v)
	case "refused_total":
		add(&s.RefusedWritesTotal, v)
	case "corrupt_total":
		add(&s.CorruptTotal, v)
	case "scrub_last_pass_timestamp_seconds":
		if v > 0 {
			t := time.Unix(int64(v), 0).UTC()
			s.LastScrubAt = &t
		}
	case "requests_total":
		add(&s.BucketRequestsTotal, v)
	}
}

// add adds v to *sum, which is nil before the first.
func add(sum **int64, v float64) {
	if *sum == nil {
		*sum = new(int64)
	}
	**sum += int64(v)
}

// finite is nil for the age of nothing.
func finite(v float64) *float64 {
	if math.IsInf(v, 0) || math.IsNaN(v) {
		return nil
	}
	return &v
}

func label(m *dto.Metric, name string) string {
	for _, l := range m.GetLabel() {
		if l.GetName() == name {
			return l.GetValue()
		}
	}
	return ""
}

func value(m *dto.Metric) float64 {
	if m.Counter != nil {
		return m.GetCounter().GetValue()
	}
	return m.GetGauge().GetValue()
}
