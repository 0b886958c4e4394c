// Package open turns the URL of a queue into a broker, and sets brokers up. It
// is the only package that imports every broker, and only Mettle's mains import it.
//
//	gcppubsub://PROJECT/PREFIX   Google Cloud Pub/Sub (see mettle/queue/pubsub)
//	nats://HOST:4222/PREFIX      NATS JetStream (see mettle/queue/nats); tls:// likewise
//	mem://                       refused: such a queue is within one process
//
// The settings that may follow a question mark are in the brokers' comments.
//
// A broker that is away when a process starts is waited for in the background,
// while calls fail with queue.ErrUnavailable. One that refuses is an error at once.
package open

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/nats"
	"github.com/mettle-build/mettle/mettle/queue/pubsub"
)

// Options are what a URL does not say. The zero Options are valid.
type Options struct {
	// Name is that of the worker, for messages. API servers have none.
	Name string
	// Logger is told of a broker that is away, and of what Setup makes. Default: none.
	Logger *slog.Logger
	// Registerer takes the metrics. nil: there are none.
	Registerer prometheus.Registerer
}

// URL is the address of a queue, which has been read but not yet been called.
type URL struct {
	text  string // without secrets
	lease time.Duration
	open  func(ctx context.Context, o Options) (queue.Broker, error)
	setup func(ctx context.Context, o Options, pools []string) error
}

// wanted is what there is.
const wanted = "nats://HOST:4222/PREFIX, tls://HOST:4222/PREFIX or gcppubsub://PROJECT/PREFIX"

// ParseURL reads the address of a queue. It calls nobody. Errors don't repeat
// passwords.
func ParseURL(s string) (*URL, error) {
	scheme, rest, ok := strings.Cut(s, "://")
	switch {
	case s == "":
		return nil, errors.New("no queue is named, want " + wanted)
	case !ok:
		return nil, fmt.Errorf("the queue %q is no URL, want %s", redact("", s), wanted)
	case scheme == "nats" || scheme == "tls":
		return parseNATS(s, redact(scheme+"://", rest))
	case scheme == "gcppubsub":
		return parsePubSub(s)
	case scheme == "mem":
		return nil, errors.New("mem:// is a queue within one process, as mettle dual has it; API servers and workers meet at " + wanted)
	}
	return nil, fmt.Errorf("there is no queue of the kind %s://, want %s", scheme, wanted)
}

// redact is an address without who we are and without settings.
func redact(scheme, rest string) string {
	rest, _, _ = strings.Cut(rest, "?")
	// Also behind a slash: a password can have one, and neither host nor prefix an @.
	return scheme + rest[strings.LastIndexByte(rest, '@')+1:]
}

func parseNATS(s, text string) (*URL, error) {
	parsed, err := nats.ParseURL(s)
	if err != nil {
		return nil, err
	}
	options := func(o Options) nats.Options {
		n := parsed
		n.Name, n.Logger, n.Registerer = o.Name, o.Logger, o.Registerer
		return n
	}
	u := &URL{text: text, lease: parsed.LeaseTime}
	if u.lease == 0 {
		u.lease = nats.DefaultLease
	}
	u.open = func(ctx context.Context, o Options) (queue.Broker, error) {
		return orNil(nats.New(ctx, options(o)))
	}
	u.setup = func(ctx context.Context, o Options, pools []string) error {
		return nats.Setup(ctx, options(o), pools...)
	}
	return u, nil
}

func parsePubSub(s string) (*URL, error) {
	parsedURL, err := url.Parse(s)
	if err != nil {
		// Its text has all of the address, with what somebody may take for the place of a password.
		if parse, ok := errors.AsType[*url.Error](err); ok {
			err = parse.Err
		}
		return nil, fmt.Errorf("the queue %q is no URL, want %s: %w", redact("gcppubsub://", strings.TrimPrefix(s, "gcppubsub://")), wanted, err)
	}
	parsed, err := pubsub.ParseURL(parsedURL)
	if err != nil {
		return nil, err
	}
	options := func(o Options) pubsub.Options {
		p := parsed
		p.Logger, p.Registerer = o.Logger, o.Registerer
		return p
	}
	u := &URL{text: redact("gcppubsub://", parsedURL.Host+parsedURL.Path), lease: parsed.LeaseTime}
	if u.lease == 0 {
		u.lease = pubsub.DefaultLease
	}
	u.open = func(ctx context.Context, o Options) (queue.Broker, error) {
		return orNil(pubsub.New(ctx, options(o)))
	}
	u.setup = func(ctx context.Context, o Options, pools []string) error {
		p := options(o)
		p.Pools = slices.Concat(p.Pools, pools)
		q, err := pubsub.New(ctx, p)
		if err != nil {
			return err
		}
		return errors.Join(q.Setup(ctx), q.Close()) //nolint:contextcheck // it takes none
	}
	return u, nil
}

// orNil makes an interface of a broker that is nil where there is an error.
func orNil[B queue.Broker](b B, err error) (queue.Broker, error) {
	if err != nil {
		return nil, err
	}
	return b, nil
}

// String is the URL without passwords and settings.
func (u *URL) String() string { return u.text }

// LeaseTime is how long a worker may be silent before its job goes to another.
func (u *URL) LeaseTime() time.Duration { return u.lease }

// Setup makes at the broker what API servers and workers need, among it what
// the jobs of the pools take beside those that the URL names. It may be run
// again at any time. The errors name the rights that are lacking, and wrap
// queue.ErrUnavailable where the broker does not answer.
func (u *URL) Setup(ctx context.Context, o Options, pools []string) error {
	return u.setup(ctx, o.withDefaults(), pools)
}

func (o Options) withDefaults() Options {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}
