// Package doctor looks at a server as a client would, and says in words what is wrong
// and what to do about it: whether it answers, how fast, who it takes the caller for,
// what it can, whether clocks agree, whether a blob comes back as it went, how wide
// the line is, and whether an action runs and is cached. It is for people who have a
// server that does not do what they expect; mettle/conform is for those who write one.
//
// `mettle doctor` is its caller.
package doctor

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	classes "github.com/mettle-build/mettle/elan/status"
)

// Outcome is how well something is.
type Outcome int

// The outcomes.
const (
	OK      Outcome = iota
	Warning         // builds work, and could do better
	Failure         // builds fail
)

// String implements fmt.Stringer.
func (o Outcome) String() string { return [...]string{"ok", "warn", "FAIL"}[o] }

// Finding is what one look has found.
type Finding struct {
	Outcome Outcome
	What    string // what was looked at
	Found   string
	// Advice is what to do; "" where all is well.
	Advice string
}

// Options are those of Examine.
type Options struct {
	// Conn is to the server, and Store its blobs by the same. The caller closes them.
	Conn  grpc.ClientConnInterface
	Store blob.Store
	// Instance is the instance name.
	Instance string
	// Platform is that of the action.
	Platform []*repb.Platform_Property
	// NoExecution leaves the action out.
	NoExecution bool
	// BandwidthBytes is how much is sent and fetched to tell the width of the line;
	// 0: 8 MiB.
	BandwidthBytes int
	// SlowCall and NarrowBytes are from where on a call's median, and the bytes a
	// second of a stream, are worth a word; 0: 50 ms and 5 MB.
	SlowCall    time.Duration
	NarrowBytes float64
	// SpeaksTLS, if set, looks whether the server's port answers a TLS handshake. It
	// is asked where a connection without TLS does not come about.
	SpeaksTLS func(context.Context) bool
	// Found, if set, is called with each finding as it comes.
	Found func(Finding)
}

// patient is one that is looked at.
type patient struct {
	o        *Options
	caps     *repb.ServerCapabilities
	findings []Finding
}

// callTimeout bounds each call but those that run an action or carry much.
const callTimeout = 10 * time.Second

// Examine looks at everything in turn, and stops where what follows could not work
// either. It returns what it found.
func Examine(ctx context.Context, o Options) []Finding {
	o.BandwidthBytes = cmp.Or(o.BandwidthBytes, 8<<20)
	o.SlowCall = cmp.Or(o.SlowCall, slowCall)
	o.NarrowBytes = cmp.Or(o.NarrowBytes, narrow)
	p := &patient{o: &o}
	for _, look := range []func(context.Context) bool{p.answers, p.announces, p.latency, p.roundTrip, p.bandwidth, p.results, p.action} {
		if !look(ctx) {
			break
		}
	}
	return p.findings
}

// Worst is that of the findings.
func Worst(fs []Finding) Outcome {
	worst := OK
	for _, f := range fs {
		worst = max(worst, f.Outcome)
	}
	return worst
}

func (p *patient) add(outcome Outcome, what, advice, format string, args ...any) {
	f := Finding{Outcome: outcome, What: what, Found: fmt.Sprintf(format, args...), Advice: advice}
	p.findings = append(p.findings, f)
	if p.o.Found != nil {
		p.o.Found(f)
	}
}

// fail is a finding of an error, with what statuses like it usually mean.
func (p *patient) fail(what string, err error) bool {
	p.add(Failure, what, adviceFor(err), "%s", words(err))
	return false
}

func words(err error) string {
	if s, ok := status.FromError(err); ok {
		return fmt.Sprintf("%s: %s", s.Code(), s.Message())
	}
	return err.Error()
}

func adviceFor(err error) string {
	code := codes.Code(classes.Proto(err).GetCode()) //nolint:gosec // a code
	_, busy := errors.AsType[*blob.BusyError](err)
	switch {
	case code == codes.ResourceExhausted || busy:
		return "a limit is reached, of the server's disk or memory, or of the caller: the message says which"
	case code == codes.Unauthenticated:
		return "the server wants to know who calls: give --token_file or a client certificate; of Bazel --remote_header=authorization=\"Bearer TOKEN\" or a credential helper"
	case code == codes.PermissionDenied:
		return "the server knows who calls, and does not let them: its operator grants the right that the message names"
	case code == codes.Unimplemented:
		return "this port speaks gRPC, but not the Remote Execution API: is it another service's, or a proxy that knows other paths?"
	case code == codes.Unavailable && strings.Contains(err.Error(), "does not look like a TLS handshake"):
		return "the server has no TLS there: call it by grpc://, or without a scheme"
	case code == codes.Unavailable && strings.Contains(err.Error(), "HTTP/1.1"):
		return "that is a port for HTTP: clients call the one for gRPC"
	case code == codes.Unavailable && strings.Contains(err.Error(), "tls"), strings.Contains(err.Error(), "x509"):
		return "TLS does not come about: is the certificate by an authority that this machine knows (--tls_ca), and for the host that is called (--tls_server_name)?"
	case code == codes.Unavailable, errors.Is(err, blob.ErrUnavailable):
		return "nobody answers there, or something between cuts the connection: is the port that for gRPC, and does a firewall or a proxy without HTTP/2 stand between?"
	case code == codes.DeadlineExceeded, errors.Is(err, context.DeadlineExceeded):
		return "the server takes the call and does not answer: look at its /readyz, and at what it waits for"
	case code == codes.FailedPrecondition, code == codes.InvalidArgument:
		return "the message names what does not fit; properties of actions are given by --platform here, and by exec_properties in Bazel"
	}
	return "the server's log has more"
}

// answers is the first call.
func (p *patient) answers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var from peer.Peer
	start := time.Now()
	caps, err := repb.NewCapabilitiesClient(p.o.Conn).GetCapabilities(ctx, &repb.GetCapabilitiesRequest{InstanceName: p.o.Instance}, grpc.Peer(&from))
	if err != nil && status.Code(err) == codes.Unavailable && p.o.SpeaksTLS != nil && p.o.SpeaksTLS(ctx) {
		p.add(Failure, "answers", "call it by grpcs://, as in grpcs://HOST:PORT; with a certificate by an authority of your own, give --tls_ca too", "the server speaks TLS there, and was called without")
		return false
	}
	if err != nil {
		return p.fail("answers", err)
	}
	p.caps = caps
	p.add(OK, "answers", "", "in %.1f ms, from %v", ms(time.Since(start)), from.Addr)
	if info, ok := from.AuthInfo.(credentials.TLSInfo); ok && len(info.State.PeerCertificates) > 0 {
		p.certificate(info)
	}
	return true
}

// soon is when a certificate is to be renewed.
const soon = 14 * 24 * time.Hour

func (p *patient) certificate(info credentials.TLSInfo) {
	c := info.State.PeerCertificates[0]
	left := time.Until(c.NotAfter)
	outcome, advice := OK, ""
	if left < soon {
		outcome, advice = Warning, "renew the server's certificate: mettle and elan read it again by themselves"
	}
	p.add(outcome, "TLS", advice, "certificate of %q by %q, good for %.0f days", c.Subject.CommonName, c.Issuer.CommonName, left.Hours()/24)
}

// announces looks at the capabilities, as far as clients stumble over them.
func (p *patient) announces(context.Context) bool {
	low, high := p.caps.GetLowApiVersion(), p.caps.GetHighApiVersion()
	fns := p.caps.GetCacheCapabilities().GetDigestFunctions()
	switch {
	case p.caps.GetCacheCapabilities() == nil:
		p.add(Failure, "announces", "this is no storage for builds", "no cache capabilities")
		return false
	case len(fns) == 0:
		p.add(Failure, "announces", "clients can't name a blob", "no digest function")
		return false
	}
	p.add(OK, "announces", "", "API %d.%d to %d.%d; %s", low.GetMajor(), low.GetMinor(), high.GetMajor(), high.GetMinor(), names(fns))
	if low.GetMajor() == 2 && low.GetMinor() > 0 {
		p.add(Warning, "old clients", "Bazel before 7 and Please stop at such a server", "the lowest version is 2.%d", low.GetMinor())
	}
	if !p.caps.GetCacheCapabilities().GetActionCacheUpdateCapabilities().GetUpdateEnabled() {
		p.add(Warning, "results of clients", "give Bazel --noremote_upload_local_results; where you should be allowed to: the policy or --ac_update says who is",
			"this caller may not set results, so what is built locally is not shared")
	}
	if !p.caps.GetExecutionCapabilities().GetExecEnabled() && !p.o.NoExecution {
		p.add(Warning, "execution", "use it as --remote_cache; as --remote_executor it does not work: is this the address of elan, or does the caller lack the right execute?",
			"not offered to this caller")
	}
	return true
}

func names(fns []repb.DigestFunction_Value) string {
	out := make([]string, len(fns))
	for i, f := range fns {
		out[i] = f.String()
	}
	return strings.Join(out, ", ")
}

// function is the one that is used here: SHA256 where it is announced.
func (p *patient) function() digest.Function {
	fns := p.caps.GetCacheCapabilities().GetDigestFunctions()
	for _, fn := range digest.Functions() {
		if slices.Contains(fns, fn.Proto()) && (fn == digest.SHA256 || !slices.Contains(fns, repb.DigestFunction_SHA256)) {
			return fn
		}
	}
	return digest.SHA256
}

const (
	latencyCalls = 30
	// slowCall is when a build of many small actions begins to wait for calls: each
	// action takes three or more, one after the other.
	slowCall = 50 * time.Millisecond
)

func (p *patient) latency(ctx context.Context) bool {
	took := make([]time.Duration, latencyCalls)
	for i := range took {
		start := time.Now()
		ds := []digest.Digest{digest.Of(p.function(), []byte(rand.Text()))}
		call, cancel := context.WithTimeout(ctx, callTimeout)
		_, err := p.o.Store.FindMissing(call, ds)
		cancel()
		if err != nil {
			return p.fail("latency", err)
		}
		took[i] = time.Since(start)
	}
	slices.Sort(took)
	outcome, advice := OK, ""
	if took[latencyCalls/2] > p.o.SlowCall {
		outcome, advice = Warning, "an action takes at least three calls: use a server that is nearer, or more --jobs"
	}
	p.add(outcome, "latency", advice, "half of %d calls take up to %.1f ms, all %.1f ms", latencyCalls, ms(took[latencyCalls/2]), ms(took[latencyCalls-1]))
	return true
}

// roundTrip stores a small blob, and wants it back.
func (p *patient) roundTrip(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	data := []byte("mettle doctor " + rand.Text())
	d := digest.Of(p.function(), data)
	if err := blob.WriteBytes(ctx, p.o.Store, d, data); err != nil {
		return p.fail("stores a blob", err)
	}
	missing, err := p.o.Store.FindMissing(ctx, []digest.Digest{d})
	if err != nil {
		return p.fail("finds the blob", err)
	}
	if len(missing) > 0 {
		p.add(Failure, "finds the blob", "several servers behind one address that do not share their storage look like that, and a cache that is full at once", "what was stored a moment ago is missing")
		return false
	}
	got, err := blob.ReadAll(ctx, p.o.Store, d, 1<<10)
	if err != nil {
		return p.fail("reads the blob", err)
	}
	if !bytes.Equal(got, data) {
		p.add(Failure, "reads the blob", "something changes bytes on the way or at rest", "it is not what was stored")
		return false
	}
	p.add(OK, "a blob", "", "stored, found, and read again")
	return true
}

// narrow is when fetching outputs is what a build waits for.
const narrow = 5e6

func (p *patient) bandwidth(ctx context.Context) bool {
	data := make([]byte, p.o.BandwidthBytes)
	if _, err := rand.Read(data); err != nil { // so that nothing compresses it
		return p.fail("bandwidth", err)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	d := digest.Of(p.function(), data)
	start := time.Now()
	if err := blob.WriteBytes(ctx, p.o.Store, d, data); err != nil {
		return p.fail("bandwidth", err)
	}
	up := float64(len(data)) / time.Since(start).Seconds()
	start = time.Now()
	if _, err := blob.ReadAll(ctx, p.o.Store, d, int64(len(data))); err != nil {
		return p.fail("bandwidth", err)
	}
	down := float64(len(data)) / time.Since(start).Seconds()
	outcome, advice := OK, ""
	if min(up, down) < p.o.NarrowBytes {
		outcome, advice = Warning, "give Bazel --remote_download_toplevel and --experimental_remote_cache_compression, so that less is carried"
	}
	p.add(outcome, "bandwidth", advice, "%.1f MB/s to the server, %.1f MB/s from it, by one stream", up/1e6, down/1e6)
	return true
}

// results looks for a result that nobody has.
func (p *patient) results(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	fn := p.function()
	_, err := repb.NewActionCacheClient(p.o.Conn).GetActionResult(ctx, &repb.GetActionResultRequest{
		InstanceName: p.o.Instance, ActionDigest: digest.Of(fn, []byte(rand.Text())).Proto(), DigestFunction: fn.Proto(),
	})
	if status.Code(err) != codes.NotFound {
		if err == nil {
			p.add(Failure, "action cache", "builds would take it for theirs", "there is a result of an action that nobody has")
			return false
		}
		return p.fail("action cache", err)
	}
	p.add(OK, "action cache", "", "answers")
	return true
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
