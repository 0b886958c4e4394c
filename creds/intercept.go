package creds

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

// ServerOptions are the interceptors, as options of a gRPC server. They come after
// those that count calls, so that refused ones count, and before all others. What Admit
// refuses before that only creds_refused_calls_total counts.
func (g *Guard) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{grpc.ChainUnaryInterceptor(g.unary), grpc.ChainStreamInterceptor(g.stream)}
}

func (g *Guard) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (resp any, err error) {
	c := call{g: g, method: info.FullMethod, rule: ruleOf(info.FullMethod)}
	if c.rule.public {
		return h(ctx, req)
	}
	defer func() { c.audit(ctx, err) }()
	inner, err := c.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer c.leave()
	if err := c.allow(req); err != nil {
		return nil, err
	}
	err = errPanicked // to the audit log, if the handler does not return
	resp, err = h(inner, req)
	if caps, ok := resp.(*repb.ServerCapabilities); ok && err == nil {
		resp = c.id.capabilities(req, caps)
	}
	return resp, err
}

// errPanicked is what became of a call whose handler has not returned.
var errPanicked = status.Error(codes.Internal, "the handler panicked")

// capabilities is caps as far as the caller has the rights for it: clients that are
// told of more stop at the refusal.
func (id *Identity) capabilities(req any, caps *repb.ServerCapabilities) *repb.ServerCapabilities {
	instance, _ := nameOf(req)
	noUpdate := !id.may(instance, []Right{ACWrite}) && caps.GetCacheCapabilities().GetActionCacheUpdateCapabilities().GetUpdateEnabled()
	noExecute := !id.may(instance, []Right{Execute}) && caps.GetExecutionCapabilities().GetExecEnabled()
	if !noUpdate && !noExecute {
		return caps
	}
	caps = proto.CloneOf(caps) // the server has one for all callers
	if noUpdate {
		caps.CacheCapabilities.ActionCacheUpdateCapabilities.UpdateEnabled = false
	}
	if noExecute {
		caps.ExecutionCapabilities.ExecEnabled = false
	}
	return caps
}

func (g *Guard) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) (err error) {
	c := call{g: g, method: info.FullMethod, rule: ruleOf(info.FullMethod)}
	if c.rule.public {
		return h(srv, ss)
	}
	ctx := ss.Context()
	defer func() { c.audit(ctx, err) }()
	inner, err := c.begin(ctx)
	if err != nil {
		return err
	}
	defer c.leave()
	guarded := &guardedStream{ServerStream: ss, ctx: inner, call: &c}
	err = errPanicked // as above
	err = h(srv, guarded)
	if refused := guarded.refused.Load(); refused != nil { // whatever the handler made of it
		return *refused
	}
	return err
}

// guardedStream looks at the first message, which names the instance. Handlers see
// to it that those that follow name the same.
type guardedStream struct {
	grpc.ServerStream
	ctx     context.Context //nolint:containedctx // that of the stream, as gRPC has it
	call    *call
	seen    bool
	refused atomic.Pointer[error] // a goroutine of the handler may receive when that has ended
}

// Context implements grpc.ServerStream.
func (s *guardedStream) Context() context.Context { return s.ctx }

// RecvMsg implements grpc.ServerStream.
func (s *guardedStream) RecvMsg(m any) error {
	if refused := s.refused.Load(); refused != nil {
		return *refused
	}
	if err := s.ServerStream.RecvMsg(m); err != nil || s.seen {
		return err
	}
	s.seen = true
	err := s.call.allow(m)
	if err != nil {
		s.refused.Store(&err)
	}
	return err
}

// call is one call on its way.
type call struct {
	g        *Guard
	method   string
	rule     rule
	id       *Identity
	instance string
	allowed  bool // it came to the handler
	leave    func()
}

// begin finds out who calls, and whether there is any way that the call could be
// allowed. The context is for the handler.
func (c *call) begin(ctx context.Context) (context.Context, error) {
	var err error
	if c.id, err = c.g.identify(ctx, true); err == nil {
		ctx, c.id, err = onBehalf(ctx, c.id)
	}
	if err != nil {
		c.g.metrics.refused.WithLabelValues("unauthenticated").Inc()
		return nil, err
	}
	if !c.rule.known && !c.id.mayAnywhere(c.rule.any) {
		return nil, c.deny("")
	}
	leave, over := c.g.limits.enter(c.id)
	if over != nil {
		c.g.metrics.refused.WithLabelValues(over.what).Inc()
		s := status.Newf(codes.ResourceExhausted, "%s is over its limit of %s in the policy of this server", c.id.Name, over.what)
		if d, err := s.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(over.after)}); err == nil {
			s = d
		}
		return nil, s.Err()
	}
	c.leave = leave
	return with(ctx, c.id), nil
}

// allow looks at what a request names.
func (c *call) allow(req any) error {
	err := c.look(req)
	c.allowed = err == nil
	return err
}

func (c *call) look(req any) error {
	if c.rule.known {
		return nil
	}
	if c.rule.scope == everywhere {
		if !c.id.mayEverywhere(c.rule.any) {
			return c.deny(" at all instances")
		}
		return nil
	}
	name, ok := nameOf(req)
	if !ok {
		return status.Error(codes.InvalidArgument, "the request can't be read: it names no instance")
	}
	var err error
	if c.instance, err = c.g.instanceOf(c.rule.scope, name); err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	if !c.id.may(c.instance, c.rule.any) {
		return c.deny(fmt.Sprintf(" at instance %.200q", c.instance))
	}
	return nil
}

func (c *call) deny(where string) error {
	c.g.metrics.refused.WithLabelValues("permission_denied").Inc()
	need := make([]string, len(c.rule.any))
	for i, r := range c.rule.any {
		need[i] = string(r)
	}
	return status.Errorf(codes.PermissionDenied, "%s lacks the right %s%s, which %.200s takes", c.id.Name, strings.Join(need, " or "), where, c.method)
}

// identify finds out who calls. Where an issuer is to be asked for that, and ask is not
// set, there is neither an identity nor an error. The error is a status.
func (g *Guard) identify(ctx context.Context, ask bool) (*Identity, error) {
	p := g.policy.Load()
	if headers := metadata.ValueFromIncomingContext(ctx, "authorization"); len(headers) > 0 {
		return g.ofToken(ctx, p, headers, ask)
	}
	from, _ := peer.FromContext(ctx)
	if from != nil {
		if info, ok := from.AuthInfo.(credentials.TLSInfo); ok && len(info.State.VerifiedChains) > 0 {
			leaf := info.State.VerifiedChains[0][0]
			err := p.stillGood(info.State.VerifiedChains, time.Now())
			if err == nil {
				err = checkCertificateName(certificateName(leaf))
			}
			if err != nil {
				return nil, status.Error(codes.Unauthenticated, err.Error())
			}
			if id := p.ofCertificate(leaf); id != nil {
				return id, nil
			}
			if p.anonymous == nil {
				return nil, status.Errorf(codes.Unauthenticated, "the client certificate of %.200q is good, and nothing is granted to it", certificateName(leaf))
			}
		}
	}
	if p.anonymous == nil {
		return nil, status.Error(codes.Unauthenticated, "this server wants to know who calls: send a header \"authorization: Bearer TOKEN\", or a client certificate where it has TLS with one")
	}
	return p.anonymous, nil
}

func (g *Guard) ofToken(ctx context.Context, p *policy, headers []string, ask bool) (*Identity, error) {
	if len(headers) > 1 {
		return nil, status.Error(codes.Unauthenticated, "there are several authorization headers, want one")
	}
	token, ok := bearer(headers[0])
	if !ok || token == "" {
		return nil, status.Error(codes.Unauthenticated, "the authorization header is not of the form \"Bearer TOKEN\"")
	}
	if len(token) > maxTokenBytes {
		return nil, status.Errorf(codes.Unauthenticated, "the token has %d bytes, want %d at most", len(token), maxTokenBytes)
	}
	if !g.o.PlaintextTokens && !isPrivate(ctx) {
		return nil, status.Error(codes.Unauthenticated, "the token came without TLS over a network, where others can read it, so it is not taken: call by grpcs://, and replace the token")
	}
	hash := sha256.Sum256([]byte(token))
	if id := p.tokens[hash]; id != nil {
		return id, nil
	}
	now := time.Now()
	if id := p.remembered.get(hash, now); id != nil {
		return id, nil
	}
	if len(p.issuers) == 0 {
		return nil, status.Error(codes.Unauthenticated, "the token is not known here")
	}
	id, expiry, err := p.verify(ctx, token, ask)
	switch {
	case errors.Is(err, errUnavailable):
		g.unavailable(ctx, err)
		return nil, status.Errorf(codes.Unavailable, "%v now: the log of this server says why", errUnavailable)
	case err != nil:
		return nil, status.Error(codes.Unauthenticated, err.Error())
	case id == nil:
		return nil, nil
	}
	p.remembered.put(hash, id, now, expiry)
	return id, nil
}

// unavailable logs what is wrong with an issuer, once, for it is not for callers whom
// nobody knows.
func (g *Guard) unavailable(ctx context.Context, err error) {
	text := err.Error()
	if before := g.issuers.Swap(&text); ctx.Err() == nil && (before == nil || *before != text) {
		g.o.Logger.ErrorContext(ctx, "callers with tokens of an issuer can't be told", "error", err)
	}
}

// maxTokenBytes bounds what is parsed for callers whom nobody knows yet.
const maxTokenBytes = 32 << 10

// isPrivate reports whether nobody can have listened: the call came by TLS, or from
// this machine.
func isPrivate(ctx context.Context) bool {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return false
	}
	if p.AuthInfo != nil && p.AuthInfo.AuthType() == "tls" {
		return true
	}
	switch a := p.Addr.(type) {
	case *net.TCPAddr:
		return a.IP.IsLoopback()
	case *net.UnixAddr:
		return true
	}
	return p.Addr.Network() == "bufconn"
}

// isLoopbackURL reports whether a URL is of this machine.
func isLoopbackURL(s string) bool {
	u, err := url.Parse(s)
	if err != nil {
		return false
	}
	ip := net.ParseIP(u.Hostname())
	return u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
}
