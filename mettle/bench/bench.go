// Package bench is the load generator behind `mettle bench`. It measures a
// Remote Execution API server, any one, by its address and over its public API
// alone, and beside it what the machine itself allows.
//
// Absolute times on a shared machine drift two-fold within the hour. So every
// figure comes with its floor, measured in the same run just before, between
// and after the slices of the measurement, and with its share of that floor's
// median:
//
//   - spawn: mkdir, fork and exec of /bin/true, wait, rmdir, with no server and
//     no input or output; by syscall.ForkExec (which shares memory with the
//     child until the exec, so that the size of this process does not count)
//     from as many goroutines as the measurement has clients.
//   - namespaces: spawn with a user, a mount and a PID namespace for each process,
//     made the cheapest way that there is.
//   - link: link and unlink of a file, one at a time.
//   - unary: a gRPC call with messages of a few bytes, over loopback TCP, at
//     the same number of clients. Client and server are both in this process.
//   - read and write: one gRPC stream in messages of 1 MiB, down and up.
//
// Floor and measurement use one connection each, with gRPC's default settings.
// Clients are closed loops: each has one call out at a time. Bytes that are
// read are counted, not hashed, and messages that are large or have many parts
// are encoded beforehand and not decoded, which the floor's are, by generated
// code: a share above 1 is possible.
//
// Of actions the report also has the overhead: what they took on their worker,
// without the command itself, by the timestamps in their metadata.
//
// This package starts no server and knows none of ours: of the project it
// imports digest alone. `mettle bench` in mettle's main calls it.
package bench

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/mettle-build/mettle/elan/digest"
)

// ErrCallsFailed is wrapped by Run's error where the run was complete, but
// calls failed or answered wrongly.
var ErrCallsFailed = errors.New("calls failed")

// Options say what to measure. The tags are for kong, which makes flags of
// them; a caller may as well fill them in by hand. Zero fields have the
// defaults that the tags show, except Remote and Out, which are required (but
// Remote is not needed for the subject floor alone).
type Options struct {
	Subjects []string `arg:"" optional:"" help:"What to measure: floor, actions, sandboxed, latency, cached, actioncache, action50, tree10k, findmissing, batch, stream, zstd, gettree, memory, load. Default: all but memory, which writes sixteen blobs of a GiB, and load, which floods the server."`

	Remote         string            `name:"remote" default:"grpc://localhost:7778" help:"Server: grpc://host:port, grpcs://host:port (TLS) or unix:/path."`
	Instance       string            `name:"instance" help:"Instance name."`
	DigestFunction string            `name:"digest_function" default:"sha256" help:"Digest function: sha256, blake3, sha1, sha384, sha512, sha256tree or gitsha1."`
	Platform       map[string]string `name:"platform" help:"Platform properties of the actions, as name=value."`
	Headers        map[string]string `name:"header" help:"Headers sent with each call, as name=value, such as authorization=Bearer …."`

	Concurrency []int         `name:"concurrency" default:"16,64" help:"Clients at once, for the subjects actions and sandboxed; the others use the first."`
	Duration    time.Duration `name:"duration" default:"5s" help:"Length of each measurement, without its floors."`

	StreamBytes int `name:"stream_bytes" default:"67108864" help:"Size of the large blobs of the subject stream."`

	MemoryBytes int `name:"memory_bytes" default:"1073741824" help:"Size of each of the sixteen blobs of the subject memory."`

	LoadCalls       int    `name:"load_calls" default:"10000" help:"How many calls at once each flood of the subject load has."`
	LoadFloods      string `name:"load_floods" help:"Only those of its floods whose names contain this."`
	LoadConnections int    `name:"load_connections" default:"1000" help:"How many connections its floods of connections have."`

	ServerMetrics []string `name:"server_metrics" help:"URL of the server's Prometheus metrics, for its CPU time, memory and goroutines; several are summed."`
	ServerPIDs    []int    `name:"server_pid" help:"Process id of a server on this machine, for its CPU time and memory; several are summed."`

	ServerDirs []string `name:"server_dir" help:"Directory of a server on this machine, such as DIR/work of mettle dual, whose files are counted before and after; several are summed." type:"path"`

	JSON bool `name:"json" help:"Print the figures as JSON."`

	// Out takes the table or the JSON.
	Out io.Writer `kong:"-"`
	// Progress, where it is not nil, takes a line as each measurement begins.
	Progress io.Writer `kong:"-"`
}

// subjects lists what can be measured, in the order in which it is.
//
//nolint:gochecknoglobals // an immutable table
var subjects = []struct {
	name string
	plan func(Options) []scenario
}{
	{"floor", floorScenarios},
	{"actions", actionScenarios},
	{"sandboxed", sandboxedScenarios},
	{"latency", latencyScenarios},
	{"cached", cachedScenarios},
	{"actioncache", actionCacheScenarios},
	{"action50", action50Scenarios},
	{"tree10k", tree10kScenarios},
	{"findmissing", findMissingScenarios},
	{"batch", batchScenarios},
	{"stream", streamScenarios},
	{"zstd", zstdScenarios},
	{"gettree", treeScenarios},
	{"memory", memoryScenarios},
	{"load", loadScenarios},
}

// byName are the subjects that are measured only where they are named.
//
//nolint:gochecknoglobals // an immutable table
var byName = []string{"memory", "load"}

// Subjects lists the names that Options.Subjects may have, in the order in
// which they are measured.
func Subjects() []string {
	names := make([]string, len(subjects))
	for i, s := range subjects {
		names[i] = s.name
	}
	return names
}

// Floor is Run for the subject floor alone: what the machine allows, with no
// server.
func Floor(ctx context.Context, o Options) error {
	o.Subjects = []string{"floor"}
	return Run(ctx, o)
}

// Run measures, and writes what it found to o.Out when done. When ctx ends, it
// stops, writes what it has, and returns an error that wraps ctx's cause. Calls
// that fail are counted, and make Run return an error that wraps
// ErrCallsFailed and tells the first of them. Each measurement takes about
// twice o.Duration, and no call more than a minute.
func Run(ctx context.Context, o Options) error {
	o, fn, err := o.withDefaults()
	if err != nil {
		return err
	}
	plan, err := o.plan()
	if err != nil {
		return err
	}
	r := runner{o: o, probe: probe{urls: o.ServerMetrics, pids: o.ServerPIDs, dirs: o.ServerDirs}}
	r.floors, err = startFloors(ctx)
	if err != nil {
		return fmt.Errorf("floor: %w", err)
	}
	defer r.floors.close()
	if slices.ContainsFunc(plan, func(s scenario) bool { return !s.isFloor() }) {
		r.client, err = dial(ctx, o, fn)
		if err != nil {
			return err
		}
		defer r.client.close()
	}
	rep := r.run(ctx, plan)
	if err := rep.write(o.Out, o.JSON); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	if ctx.Err() != nil {
		return fmt.Errorf("interrupted: %w", context.Cause(ctx))
	}
	return rep.err()
}

func (o Options) withDefaults() (Options, digest.Function, error) {
	if o.DigestFunction == "" {
		o.DigestFunction = digest.SHA256.String()
	}
	fn, ok := digest.FunctionNamed(strings.ToLower(o.DigestFunction))
	if !ok {
		return o, 0, fmt.Errorf("digest function %q is none of %v", o.DigestFunction, digest.Functions())
	}
	if o.Out == nil {
		return o, 0, errors.New("the bench has no writer for its report")
	}
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	if o.Duration == 0 {
		o.Duration = 5 * time.Second
	}
	if o.Duration < 0 {
		return o, 0, fmt.Errorf("duration %v is negative", o.Duration)
	}
	if o.StreamBytes == 0 {
		o.StreamBytes = 64 * mib
	}
	if o.StreamBytes < mib || o.StreamBytes > gib {
		return o, 0, fmt.Errorf("stream_bytes %d is not between 1 MiB and 1 GiB", o.StreamBytes)
	}
	if o.MemoryBytes == 0 {
		o.MemoryBytes = gib
	}
	if o.MemoryBytes < 2*mib || o.MemoryBytes%mib != 0 {
		return o, 0, fmt.Errorf("memory_bytes %d is not a number of MiB from 2 on", o.MemoryBytes)
	}
	if o.LoadCalls == 0 {
		o.LoadCalls = 10_000
	}
	if o.LoadConnections == 0 {
		o.LoadConnections = 1000
	}
	if o.LoadCalls < 1 || o.LoadCalls > 100_000 || o.LoadConnections < 1 || o.LoadConnections > 100_000 {
		return o, 0, fmt.Errorf("load_calls %d or load_connections %d is not between 1 and 100000", o.LoadCalls, o.LoadConnections)
	}
	if len(o.Concurrency) == 0 {
		o.Concurrency = []int{16, 64}
	}
	for _, c := range o.Concurrency {
		// One connection carries a few hundred streams well; more measures gRPC.
		if c < 1 || c > 10000 {
			return o, 0, fmt.Errorf("concurrency %d is not between 1 and 10000", c)
		}
	}
	return o, fn, nil
}

// plan lists the measurements, in the order of the table of subjects.
func (o Options) plan() ([]scenario, error) {
	for _, want := range o.Subjects {
		if !slices.Contains(Subjects(), want) {
			return nil, fmt.Errorf("subject %q is none of %s", want, strings.Join(Subjects(), ", "))
		}
	}
	var plan []scenario
	for _, s := range subjects {
		all := len(o.Subjects) == 0 && !slices.Contains(byName, s.name)
		if all || slices.Contains(o.Subjects, s.name) {
			for _, sc := range s.plan(o) {
				sc.subject = s.name
				plan = append(plan, sc)
			}
		}
	}
	return plan, nil
}

// newReport is a report of no results.
func newReport(o Options) *Report {
	return &Report{
		Remote: o.Remote, Instance: o.Instance, DigestFunction: o.DigestFunction,
		DurationSeconds: o.Duration.Seconds(), Started: time.Now().UTC().Truncate(time.Second),
		Machine: Machine{CPUs: runtime.NumCPU(), OS: runtime.GOOS, Arch: runtime.GOARCH, Go: runtime.Version()},
		Results: []Result{},
	}
}

// newSalt is a string that no other run has, so that nothing is in the server
// before this one puts it there.
func newSalt() string {
	var b [12]byte
	_, _ = rand.Read(b[:]) // never fails, by its contract
	return hex.EncodeToString(b[:])
}
