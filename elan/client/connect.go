package client

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	_ "google.golang.org/grpc/health" // lets connections ask servers for their health
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

const (
	// reconnectFrom and reconnectTo are the pauses between attempts to reach a
	// server that is away: a build waits for it. gRPC's own grow to two minutes.
	reconnectFrom = 100 * time.Millisecond
	reconnectTo   = 2 * time.Second
	// connectTimeout is for one attempt. A machine that is gone does not answer at
	// all, and may be back by the next.
	connectTimeout = 5 * time.Second

	// balanced makes calls take turns with the servers that can be reached and
	// that do not say themselves that they do not serve.
	balanced = `{"loadBalancingConfig":[{"round_robin":{}}],"healthCheckConfig":{"serviceName":""}}`
)

// ParseTargets splits the targets of Connect: one, as in elan:7777 or
// dns:///elan:7777, which stands for all addresses of that name, or several
// servers, as in a:7777,b:7777. A scheme of grpc:// is left out.
func ParseTargets(s string) ([]string, error) {
	var targets []string
	for t := range strings.SplitSeq(s, ",") {
		t = strings.TrimPrefix(strings.TrimSpace(t), "grpc://")
		if t == "" {
			return nil, fmt.Errorf("server address %q: there is nothing before or after a comma", s)
		}
		targets = append(targets, t)
	}
	if len(targets) > 1 {
		for _, t := range targets {
			if strings.Contains(t, "://") || strings.Contains(t, ":///") {
				return nil, fmt.Errorf("server address %q: one of several is HOST:PORT, without a scheme", t)
			}
		}
	}
	return targets, nil
}

// Connect is a connection to all of targets (see ParseTargets), which are alike,
// without TLS unless one of opts brings credentials. It makes no call and does
// not wait: servers may be away and come and go. Calls take turns with those that
// can be reached; where there is none they fail with UNAVAILABLE, and for as long
// as it takes each is tried again, at least every two seconds. The caller closes
// the connection.
func Connect(targets []string, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	if len(targets) == 0 {
		return nil, errors.New("connect: no server is named")
	}
	target := targets[0]
	opts = append(append(dialOptions(),
		grpc.WithDefaultServiceConfig(balanced),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: reconnectFrom, Multiplier: 1.6, Jitter: 0.2, MaxDelay: reconnectTo},
			MinConnectTimeout: connectTimeout,
		}),
		grpc.WithIdleTimeout(0), // a server that is back is found before it is needed
	), opts...)
	if len(targets) > 1 {
		r := manual.NewBuilderWithScheme("servers")
		state := resolver.State{}
		for _, t := range targets {
			state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: t, ServerName: t}}})
		}
		r.InitialState(state)
		opts = append(opts, grpc.WithResolvers(r))
		target = "servers:///" + strings.Join(targets, ",")
	}
	conn, err := grpc.NewClient(target, opts...)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", strings.Join(targets, ","), err)
	}
	conn.Connect()
	return conn, nil
}
