// Package conform holds a server to the Remote Execution API: case by case, each
// with the words of the specification that it is about. It knows servers by the
// public API alone, any one, and leaves nothing behind there but small blobs and
// results, under digests that nobody else has.
//
// Its cases are in the files by service; Run runs them and Report prints what came
// out. `mettle conform` is the caller, and the end-to-end tests.
package conform

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"regexp"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/digest"
)

// Level is how strongly the specification asks.
type Level int

// The levels. What is not in capital letters in the specification, but said as a
// fact, is a Must.
const (
	Must Level = iota
	Should
)

// String implements fmt.Stringer.
func (l Level) String() string {
	if l == Should {
		return "SHOULD"
	}
	return "MUST"
}

// Case is one requirement.
type Case struct {
	// Name is the service, a slash, and what is tried.
	Name string
	// Clause is the words of the specification.
	Clause string
	Level  Level
	// Needs is what of the server the case is about; nil: what every server has.
	Needs []need
	run   func(ctx context.Context, t *T)
}

// need says why a case is not for a server; "": it is.
type need func(s *server) string

// Outcome is what came out of a case.
type Outcome int

// The outcomes.
const (
	Passed Outcome = iota
	Failed
	Skipped
)

// String implements fmt.Stringer.
func (o Outcome) String() string {
	return [...]string{"pass", "FAIL", "skip"}[o]
}

// Result is a case that was run.
type Result struct {
	Case     Case
	Outcome  Outcome
	Messages []string // what was wrong, or why it was skipped
	Took     time.Duration
}

// Options are those of Run.
type Options struct {
	// Conn is to the server. The caller closes it.
	Conn grpc.ClientConnInterface
	// Instance is the instance name.
	Instance string
	// Platform is that of actions, for a server that refuses those without.
	Platform []*repb.Platform_Property
	// NoExecution leaves out the cases of the Execution service.
	NoExecution bool
	// Match, if set, is of the names of the cases that are run.
	Match *regexp.Regexp
	// Parallel is how many run at once; 0: 8.
	Parallel int
	// Timeout bounds each case; 0: a minute.
	Timeout time.Duration
	// Done, if set, is called with each result as it comes, one at a time.
	Done func(Result)
}

// Run runs the cases, and returns the results in the order of Cases. The error says
// why nothing could be tried.
func Run(ctx context.Context, o Options) ([]Result, error) {
	if o.Conn == nil || o.Parallel < 0 || o.Timeout < 0 {
		return nil, errors.New("conform: Options need a Conn, and no negative numbers")
	}
	if o.Parallel == 0 {
		o.Parallel = 8
	}
	if o.Timeout == 0 {
		o.Timeout = time.Minute
	}
	s, err := newServer(ctx, &o)
	if err != nil {
		return nil, err
	}
	var cases []Case
	for _, c := range Cases() {
		if o.Match == nil || o.Match.MatchString(c.Name) {
			cases = append(cases, c)
		}
	}
	results := make([]Result, len(cases))
	var mu sync.Mutex // of Done
	var wg sync.WaitGroup
	slots := make(chan struct{}, o.Parallel)
	for i, c := range cases {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			results[i] = s.try(ctx, c)
			if o.Done != nil {
				mu.Lock()
				defer mu.Unlock()
				o.Done(results[i])
			}
		})
	}
	wg.Wait()
	return results, ctx.Err()
}

// server is the server under test.
type server struct {
	o     *Options
	caps  *repb.ServerCapabilities
	fns   []digest.Function // announced, that are known here
	salt  string            // nobody else's digests have it
	calls clients
}

func newServer(ctx context.Context, o *Options) (*server, error) {
	s := &server{o: o, salt: rand.Text(), calls: newClients(o.Conn)}
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	caps, err := s.calls.caps.GetCapabilities(ctx, &repb.GetCapabilitiesRequest{InstanceName: o.Instance})
	if err != nil {
		return nil, fmt.Errorf("ask for the capabilities: %w", err)
	}
	s.caps = caps
	for _, v := range s.functions() {
		for _, fn := range digest.Functions() {
			if fn.Proto() == v {
				s.fns = append(s.fns, fn)
			}
		}
	}
	if len(s.fns) == 0 {
		return nil, fmt.Errorf("the server announces the digest functions %v, of which none is known here", s.functions())
	}
	return s, nil
}

// functions are those that the server announces, for storage or else for execution.
func (s *server) functions() []repb.DigestFunction_Value {
	if fns := s.caps.GetCacheCapabilities().GetDigestFunctions(); len(fns) > 0 {
		return fns
	}
	e := s.caps.GetExecutionCapabilities()
	return append(e.GetDigestFunctions(), e.GetDigestFunction())
}

// stop is how a case ends before its last line.
type stop struct{}

// try runs one case.
func (s *server) try(ctx context.Context, c Case) (r Result) {
	r = Result{Case: c}
	for _, n := range c.Needs {
		if why := n(s); why != "" {
			return Result{Case: c, Outcome: Skipped, Messages: []string{why}}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, s.o.Timeout)
	defer cancel()
	t := &T{server: s, fn: s.fns[0], name: c.Name}
	for _, fn := range s.fns {
		if fn == digest.SHA256 {
			t.fn = fn
		}
	}
	start := time.Now()
	func() {
		defer func() {
			switch v := recover().(type) {
			case nil, stop:
			default:
				t.messages = append(t.messages, fmt.Sprintf("panic: %v\n%s", v, debug.Stack()))
				t.failed = true
			}
		}()
		c.run(ctx, t)
	}()
	r.Took, r.Messages = time.Since(start), t.messages
	switch {
	case t.failed:
		r.Outcome = Failed
	case t.skipped:
		r.Outcome = Skipped
	}
	return r
}

// T is a case that runs. It is used by one goroutine.
type T struct {
	*server
	fn       digest.Function
	name     string
	made     int // blobs, to tell them apart
	failed   bool
	skipped  bool
	messages []string
}

// errorf notes that the server does not do what is asked.
func (t *T) errorf(format string, args ...any) {
	t.failed = true
	m := fmt.Sprintf(format, args...)
	t.messages = append(t.messages, strings.ToValidUTF8(m[:min(len(m), 2000)], "?"))
}

// fatalf is errorf, after which there is nothing more to try.
func (t *T) fatalf(format string, args ...any) {
	t.errorf(format, args...)
	panic(stop{})
}

// skipf ends the case: it is not for this server.
func (t *T) skipf(format string, args ...any) {
	t.skipped = true
	t.messages = append(t.messages, fmt.Sprintf(format, args...))
	panic(stop{})
}

// Cases are all cases, in the order in which they are reported.
func Cases() []Case {
	var all []Case
	for _, cases := range [][]Case{
		capabilitiesCases(), findCases(), batchCases(), functionCases(), readCases(), writeCases(), compressedCases(), instanceCases(),
		treeCases(), chunkCases(), actionCases(), operationCases(), executeCases(), outputCases(), refusalCases(),
	} {
		all = append(all, cases...)
	}
	return all
}
