package creds

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Options are those of New.
type Options struct {
	// Policy is the path of the file. Required.
	Policy string
	// ReloadEvery is how often the file, and those that it names, are read again.
	// 0: 5 s.
	ReloadEvery time.Duration
	// PlaintextTokens takes tokens also from connections without TLS that come from
	// other machines, which whoever listens on the way can then use.
	PlaintextTokens bool
	// OperationInstance is the instance in the name of an operation. nil: the
	// server has none.
	OperationInstance func(name string) (string, error)
	// Canonical is the instance whose rights count for one that a request names. nil:
	// each has its own.
	Canonical func(instance string) string
	// Audit gets a record of each write to the ActionCache and of each call that
	// takes the right admin, allowed or not. nil: nobody does.
	Audit *slog.Logger
	// Logger gets what an operator should know. nil: nobody does.
	Logger *slog.Logger
	// Registerer takes the metrics. nil: there are none.
	Registerer prometheus.Registerer
}

// Guard lets calls pass that the policy allows. It is safe for concurrent use.
type Guard struct {
	o       Options
	policy  atomic.Pointer[policy]
	limits  limiters
	audits  audits
	metrics *guardMetrics
	issuers atomic.Pointer[string] // what was wrong with one last
	last    string                 // the mistake in what was read last; Run's
}

// New reads the policy. The error names the line that is wrong.
func New(o Options) (*Guard, error) {
	if o.ReloadEvery == 0 {
		o.ReloadEvery = 5 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Audit == nil {
		o.Audit = slog.New(slog.DiscardHandler)
	}
	if o.OperationInstance == nil {
		o.OperationInstance = func(string) (string, error) { return "", errors.New("there are no operations here") }
	}
	if o.Canonical == nil {
		o.Canonical = func(instance string) string { return instance }
	}
	g := &Guard{o: o, audits: newAudits()}
	var err error
	if g.metrics, err = newMetrics(o.Registerer); err != nil {
		return nil, err
	}
	p, err := g.read()
	if err != nil {
		return nil, err
	}
	g.adopt(p)
	return g, nil
}

// read reads the policy and what it names.
func (g *Guard) read() (*policy, error) {
	data, err := readFile(g.o.Policy)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	p, err := parsePolicy(data, filepath.Dir(g.o.Policy))
	if err != nil {
		return nil, fmt.Errorf("policy %s: %w", g.o.Policy, err)
	}
	return p, nil
}

// contents tells two states of files apart. It is of the same bytes that a policy was
// made of: what changes between two readings of a file is found by the next look.
func contents(policy string, files []string) ([][sha256.Size]byte, error) {
	sums := make([][sha256.Size]byte, 0, 1+len(files))
	for _, path := range append([]string{policy}, files...) {
		data, err := readFile(path)
		if err != nil {
			return nil, err
		}
		sums = append(sums, sha256.Sum256(data))
	}
	return sums, nil
}

func (g *Guard) adopt(p *policy) {
	if before := g.policy.Load(); before != nil {
		p.keepIssuers(before)
	}
	g.policy.Store(p)
	g.last = ""
	g.metrics.loaded.SetToCurrentTime()
	for _, path := range p.secrets {
		warnExposed(g.o.Logger, path)
	}
}

// Run reads the policy again whenever it has changed, and asks issuers for their keys
// from time to time, until ctx is done. A policy with mistakes is reported, and the
// last good one stays.
func (g *Guard) Run(ctx context.Context) error {
	var both sync.WaitGroup
	both.Go(func() { g.every(ctx, g.reload) })
	both.Go(func() {
		g.every(ctx, func() {
			for _, i := range g.policy.Load().issuers {
				if i.asked != nil {
					i.asked.refresh(g.o.Logger)
				}
			}
		})
	})
	both.Wait()
	return nil
}

// every does something each ReloadEvery until ctx is done.
func (g *Guard) every(ctx context.Context, do func()) {
	tick := time.NewTicker(g.o.ReloadEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			do()
		}
	}
}

func (g *Guard) reload() {
	now := g.policy.Load()
	sums, err := contents(g.o.Policy, now.files)
	if err == nil && slices.Equal(sums, now.sums) {
		g.last = ""
		return
	}
	p, err := g.read()
	if err != nil {
		g.metrics.failures.Inc()
		if err.Error() != g.last {
			g.o.Logger.Error("the policy has mistakes, the last good one stays", "error", err)
		}
		g.last = err.Error()
		return
	}
	g.adopt(p)
	g.o.Logger.Info("the policy was read again", "policy", g.o.Policy)
}

// Admit refuses a call of a method before its message is received, where its headers
// tell already that it is refused: a message takes memory, and gRPC receives it whole
// before the interceptors see the call. It waits for nobody; what it lets pass the
// interceptors look at. The error is a status.
func (g *Guard) Admit(ctx context.Context, method string) error {
	c := call{g: g, method: method, rule: ruleOf(method)}
	if c.rule.public {
		return nil
	}
	var err error
	if c.id, err = g.identify(ctx, false); err != nil {
		g.metrics.refused.WithLabelValues("unauthenticated").Inc()
	} else if c.id != nil && !c.rule.known && !c.id.mayAnywhere(c.rule.any) {
		err = c.deny("")
	}
	if err != nil {
		c.audit(ctx, err)
	}
	return err
}

// Files are the files that the policy was made of, beside itself.
func (g *Guard) Files() []string { return slices.Clone(g.policy.Load().files) }

// HasTokens reports whether the policy has identities with tokens, which take TLS.
func (g *Guard) HasTokens() bool {
	p := g.policy.Load()
	return len(p.tokens) > 0 || len(p.issuers) > 0
}

// bearer is the token of an authorization header.
func bearer(header string) (string, bool) {
	scheme, token, ok := strings.Cut(header, " ")
	return strings.TrimSpace(token), ok && strings.EqualFold(scheme, "bearer")
}
