// Package relay passes the storage calls of clients on to Elan, so that an API
// server is the one address that a client needs: ContentAddressableStorage,
// ActionCache, ByteStream, the Remote Asset API and log streams, message by message as
// bytes, without looking at them. Metadata, deadlines and cancellation go on to the
// storage; its headers, trailers and statuses, with their details, come back as
// they are. The storage alone decides what a caller may do.
//
// Storage that goes away and returns stalls a build and does not fail it: calls
// wait for it, up to Options.Wait, and those that were under way are made again,
// at another server if there is one, as long as nothing of an answer has been
// passed on and what the client sent is still at hand (all of it, where it is one
// message; the first 64 KiB of an upload). The others end with UNAVAILABLE, which
// clients retry. All storage calls may be repeated, because what they name is
// named by its content; but a fetch of an asset that was answered is not, since
// Elan has tried its origin often enough.
//
// Of one stream no more is held here than a message and what its windows let in,
// some 1.5 MiB: a client that reads slowly holds up its own stream and no other.
// Passing a call on takes what gRPC takes for one more hop: on a machine where a
// blob of 1 KiB takes 50 µs of CPU to be read, client and storage together, it takes
// 10 to 50 more, and 0.5 ms for a MiB of a large one.
//
// Capabilities are the storage's, asked for each time, with the execution that
// this server offers. They are not remembered: they depend on who asks, a build
// asks once, and one that began while the storage is away would wait at its
// next call.
//
// A log stream is in the memory of one storage server. One that has it not says so,
// and then the next is asked, for as long as there may be others.
//
// It neither balances nor knows addresses: its connections do, see
// elan/client.Connect. The mains of mettle register it.
package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	assetpb "github.com/bazelbuild/remote-apis/build/bazel/remote/asset/v1"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	logpb "github.com/bazelbuild/remote-apis/build/bazel/remote/logstream/v1"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/mettle-build/mettle/elan/wire"
)

const (
	// defaultWait outlasts the restart of a storage server, its move to another
	// machine, and the time that a dead connection takes to be noticed.
	defaultWait = 60 * time.Second
	// defaultMaxWaiting is what two clients like Bazel may have under way.
	defaultMaxWaiting = 20_000
	// maxKept is how much of an upload is kept for being sent again: the whole of
	// most blobs, which Bazel sends in messages of 16 KiB.
	maxKept = 64 << 10
)

// Options are those of New.
type Options struct {
	// Conns are connections to the storage, at least one, each to all of its
	// servers, made with DialOptions. Calls take turns with them: several are of use where one
	// connection is as much as a CPU can handle. The caller closes them, after
	// the server that they serve.
	Conns []*grpc.ClientConn
	// Execution is announced by Capabilities. nil: there is none. It must not be
	// changed any more.
	Execution *repb.ExecutionCapabilities
	// NoAssets leaves the Fetch service of the Remote Asset API out, by which the
	// storage fetches what callers name. Storage that lets only its own machine do
	// so takes this server's clients for that machine's.
	NoAssets bool
	// PassCredentials passes on what clients show of themselves: authorization
	// headers, and whatever else they send along. It is for connections on which nobody
	// else can read them, and that have no credentials of their own. Without it,
	// RequestMetadata and traces are passed on, and nothing else.
	PassCredentials bool
	// Caller names who makes the call of ctx, which the storage is told; "": nobody
	// knows. nil: it is told of nobody. What clients say of that is never passed on.
	Caller func(ctx context.Context) string
	// Patient lets the client of the call of ctx be silent: a command whose log it
	// writes may print nothing for hours. nil: nobody minds.
	Patient func(ctx context.Context)
	// Wait is for how long calls wait for storage that is away; 0 means a minute.
	// A call with a deadline is answered somewhat before that in any case.
	Wait time.Duration
	// MaxWaiting is how many calls may wait at once; others fail at once. 0 means
	// 20,000.
	MaxWaiting int
	// MaxBatchBytes is the largest batch that Capabilities may announce, where the
	// storage takes larger ones than this server; 0 means 15.5 MiB.
	MaxBatchBytes int64
	// Logger gets what operators should know; nil discards it.
	Logger *slog.Logger
	// Registerer takes the metrics. nil: they are counted for nobody.
	Registerer prometheus.Registerer
}

// defaultMaxBatchBytes is what elan/rpc's servers take, which leave half a MiB of
// a message of 16 for what is around the blobs.
const defaultMaxBatchBytes = 15<<20 + 512<<10

// streamWindow is how much of a stream waits here for a client that is slow, beside
// the message that is being sent to it. Eight times as much, which elan/client has
// for itself, is no faster, with messages of 1 MiB.
const streamWindow = 512 << 10

// DialOptions are for the connections of a Relay, beside those of
// elan/client.Connect.
func DialOptions() []grpc.DialOption {
	return []grpc.DialOption{grpc.WithInitialWindowSize(streamWindow)}
}

// Relay passes calls on. It is safe for concurrent use, starts no goroutines that
// outlive a call, and needs no closing; Shutdown ends the calls that last.
type Relay struct {
	o       Options
	codec   grpc.CallOption
	metrics *metrics
	turn    atomic.Uint64
	waiting atomic.Int64
	away    atomic.Bool // the log says so

	drain    sync.Once
	draining chan struct{} // closed by Shutdown
}

// New checks the options and returns a Relay. It makes no call.
func New(o Options) (*Relay, error) {
	if len(o.Conns) == 0 {
		return nil, errors.New("relay: Options need Conns")
	}
	if o.Wait < 0 || o.MaxWaiting < 0 || o.MaxBatchBytes < 0 {
		return nil, errors.New("relay: Wait, MaxWaiting and MaxBatchBytes may not be negative")
	}
	if o.Wait == 0 {
		o.Wait = defaultWait
	}
	if o.MaxWaiting == 0 {
		o.MaxWaiting = defaultMaxWaiting
	}
	if o.MaxBatchBytes == 0 {
		o.MaxBatchBytes = defaultMaxBatchBytes
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Patient == nil {
		o.Patient = func(context.Context) {}
	}
	r := &Relay{o: o, draining: make(chan struct{}), codec: grpc.ForceCodecV2(wire.NewCodec(wire.NewPool()))}
	var err error
	if r.metrics, err = newMetrics(o.Registerer, r); err != nil {
		return nil, fmt.Errorf("relay: %w", err)
	}
	return r, nil
}

// method is one that is passed on.
type method struct {
	full string
	desc *grpc.StreamDesc
	// once: it is not made again where the storage has answered.
	once bool
}

// Register registers the services that are passed on, and Capabilities, with s,
// which has the codec of elan/wire, as servers of elan/rpc do. To its interceptors
// what is passed on are *wire.Raw.
func (r *Relay) Register(s grpc.ServiceRegistrar) {
	repb.RegisterCapabilitiesServer(s, &capabilitiesServer{r: r})
	reapi := repb.File_build_bazel_remote_execution_v2_remote_execution_proto.Services()
	assets := assetpb.File_build_bazel_remote_asset_v1_remote_asset_proto.Services()
	r.register(s, reapi.ByName("ContentAddressableStorage"), method{})
	r.register(s, reapi.ByName("ActionCache"), method{})
	r.register(s, bytestream.File_google_bytestream_bytestream_proto.Services().ByName("ByteStream"), method{})
	if !r.o.NoAssets {
		r.register(s, assets.ByName("Fetch"), method{once: true})
	}
	r.register(s, assets.ByName("Push"), method{})
	r.register(s, logpb.File_build_bazel_remote_logstream_v1_remote_logstream_proto.Services().ByName("LogStreamService"), method{})
}

// register registers one service, whose methods are all like m.
func (r *Relay) register(s grpc.ServiceRegistrar, service protoreflect.ServiceDescriptor, m method) {
	desc := &grpc.ServiceDesc{ServiceName: string(service.FullName()), Metadata: service.ParentFile().Path()}
	for i := range service.Methods().Len() {
		d := service.Methods().Get(i)
		m := m
		name := string(d.Name())
		m.full = "/" + desc.ServiceName + "/" + name
		// To this side all streams are of both directions, so that messages and
		// ends pass in the order in which they come.
		m.desc = &grpc.StreamDesc{StreamName: name, ClientStreams: true, ServerStreams: true}
		switch {
		case d.IsStreamingClient():
			desc.Streams = append(desc.Streams, grpc.StreamDesc{
				StreamName: name, ClientStreams: true, ServerStreams: d.IsStreamingServer(),
				Handler: func(_ any, ss grpc.ServerStream) error { return r.upload(ss, &m) },
			})
		case d.IsStreamingServer():
			desc.Streams = append(desc.Streams, grpc.StreamDesc{
				StreamName: name, ServerStreams: true,
				Handler: func(_ any, ss grpc.ServerStream) error { return r.download(ss, &m) },
			})
		default:
			desc.Methods = append(desc.Methods, grpc.MethodDesc{MethodName: name, Handler: r.unaryHandler(&m)})
		}
	}
	s.RegisterService(desc, nil)
}

// unaryHandler is what generated code makes of a handler.
func (r *Relay) unaryHandler(m *method) grpc.MethodHandler {
	return func(_ any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		req := &wire.Raw{}
		if err := decode(req); err != nil {
			return nil, err
		}
		defer req.Free()
		if interceptor == nil {
			return r.unary(ctx, m, req)
		}
		return interceptor(ctx, req, &grpc.UnaryServerInfo{FullMethod: m.full}, func(ctx context.Context, _ any) (any, error) {
			return r.unary(ctx, m, req)
		})
	}
}
