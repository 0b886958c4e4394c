package metrics

import (
	"context"
	"errors"
	"fmt"
	"path"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
)

// ClientOptions configure a Client.
type ClientOptions struct {
	// Prefix begins the metrics' names: "mettle_storage" gives
	// mettle_storage_call_seconds. It is required.
	Prefix string
	// Registerer takes the metrics. It is required.
	Registerer prometheus.Registerer
}

// Client observes the calls of a gRPC client: it counts and times them, by method,
// and counts the bytes of their messages as they travel. It is a stats.Handler for
// grpc.WithStatsHandler, of any number of connections, and safe for concurrent use.
// The methods are those that the program itself calls, so that there are few.
type Client struct {
	calls          *prometheus.CounterVec
	seconds        *prometheus.HistogramVec
	sent, received prometheus.Counter

	methods sync.Map // full method name → *clientMethod
}

var _ stats.Handler = (*Client)(nil)

type clientMethod struct {
	name    string
	ok      prometheus.Counter
	seconds prometheus.Observer
}

// NewClient registers the metrics and returns their Client. It fails if the prefix
// does not fit in a metric's name, or if the names are taken in the Registerer.
func NewClient(o ClientOptions) (*Client, error) {
	if !prefixPattern.MatchString(o.Prefix) {
		return nil, fmt.Errorf("metrics prefix %q does not match %v", o.Prefix, prefixPattern)
	}
	if o.Registerer == nil {
		return nil, errors.New("metrics of a client need a registerer")
	}
	c := &Client{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: o.Prefix, Name: "calls_total", Help: "Calls to the storage that have ended, by method and status code, each try counted.",
		}, []string{"method", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: o.Prefix, Name: "call_seconds", Help: "How long calls to the storage took, each try counted; of streams, to their end.",
			Buckets: prometheus.ExponentialBuckets(0.00025, 4, 11), // as those of the server, to 4 minutes
		}, []string{"method"}),
	}
	bytes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: o.Prefix, Name: "bytes_total", Help: "Bytes of messages to and from the storage as they travel, compressed where they are: sent, received.",
	}, []string{"direction"})
	c.sent, c.received = bytes.WithLabelValues("sent"), bytes.WithLabelValues("received")
	for _, m := range []prometheus.Collector{c.calls, c.seconds, bytes} {
		if err := o.Registerer.Register(m); err != nil {
			return nil, fmt.Errorf("register metrics of a client: %w", err)
		}
	}
	return c, nil
}

type clientMethodKey struct{}

// TagRPC implements stats.Handler.
func (c *Client) TagRPC(ctx context.Context, info *stats.RPCTagInfo) context.Context {
	return context.WithValue(ctx, clientMethodKey{}, c.method(info.FullMethodName))
}

func (c *Client) method(full string) *clientMethod {
	if m, ok := c.methods.Load(full); ok {
		return m.(*clientMethod)
	}
	name := path.Base(full)
	m, _ := c.methods.LoadOrStore(full, &clientMethod{name: name, ok: c.calls.WithLabelValues(name, "OK"), seconds: c.seconds.WithLabelValues(name)})
	return m.(*clientMethod)
}

// HandleRPC implements stats.Handler.
func (c *Client) HandleRPC(ctx context.Context, s stats.RPCStats) {
	switch s := s.(type) {
	case *stats.InPayload:
		c.received.Add(float64(s.WireLength))
	case *stats.OutPayload:
		c.sent.Add(float64(s.WireLength))
	case *stats.End:
		m, ok := ctx.Value(clientMethodKey{}).(*clientMethod)
		if !ok {
			return
		}
		m.seconds.Observe(s.EndTime.Sub(s.BeginTime).Seconds())
		if s.Error == nil {
			m.ok.Inc()
			return
		}
		c.calls.WithLabelValues(m.name, status.Code(s.Error).String()).Inc()
	}
}

// TagConn implements stats.Handler.
func (*Client) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn implements stats.Handler.
func (*Client) HandleConn(context.Context, stats.ConnStats) {}
