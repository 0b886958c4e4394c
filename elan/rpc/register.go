// Package rpc is elan's gRPC edge: Capabilities, ContentAddressableStorage,
// ByteStream and ActionCache over a blob.Store and an ActionCache, the Remote Asset
// API over elan/asset, and log streams over elan/logstream, one file a service or call.
//
// It checks what clients send, keeps replies within what messages hold, and
// turns errors into statuses (elan/status). It neither listens nor
// authenticates, and it stores nothing but the state of broken-off uploads. The
// mains call Register, those of elan and of mettle dual.
//
// Any instance name is served that the specification allows. Results of actions
// belong to one instance; blobs are shared by all, or are kept apart too, as
// Options.Stores has it.
package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	logpb "github.com/bazelbuild/remote-apis/build/bazel/remote/logstream/v1"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/logstream"
	"github.com/mettle-build/mettle/elan/resource"
	"github.com/mettle-build/mettle/elan/wire"
)

// The defaults of Options.
const (
	// defaultMaxMessageBytes is gRPC's own default, in all languages.
	defaultMaxMessageBytes = 4 << 20
	// batchMargin is left of a message for what is around the blobs of a batch:
	// some hundred bytes each, for as many as clients put into one.
	batchMargin = 512 << 10
	// MaxBatch is the largest MaxBatchBytes.
	MaxBatch = MaxMessageBytes - batchMargin
	// defaultParallel is how many blobs of one batch are worked on at once: what
	// hides a remote store's latency, and no more than a local one bears.
	defaultParallel = 8
	// defaultMaxPartialUploads and defaultPartialUploadTimeout bound what broken
	// connections leave behind. Clients come back within seconds or not at all.
	defaultMaxPartialUploads    = 64
	defaultPartialUploadTimeout = 5 * time.Minute
	// defaultMaxDecoders makes for at most some 140 MiB, with windows as large as
	// they may be; those of Bazel, of 2 MiB, make for 40.
	defaultMaxDecoders = 16
)

// Actions is an ActionCache: an *action.Cache, or one that is elsewhere.
type Actions interface {
	action.Getter
	action.Putter
}

// Failures finds and keeps failed actions: an *action.Failures.
type Failures interface {
	Put(ctx context.Context, k blob.EntryKey, resp *repb.ExecuteResponse) error
	Get(ctx context.Context, k blob.EntryKey) (*action.Failure, error)
}

// Options are those of Register.
type Options struct {
	// Store and Actions are what is served. Both are needed.
	Store   blob.Store
	Actions Actions
	// Stores gives the blobs of an instance, where each has its own: see
	// elan/blob/instances. nil: Store, for all of them.
	Stores func(instance string) blob.Store
	// Assets, if it is set, is served as the Remote Asset API.
	Assets Assets
	// LogStreams, if they are set, are served as the LogStream API and by ByteStream.
	// The caller shuts them down before the server, whose calls wait for them.
	LogStreams *logstream.Streams
	// Updates decides who may call UpdateActionResult; nil lets everyone.
	Updates action.Updates
	// Caller names whom the call of ctx is for, and the server that makes it in that
	// one's place, which are noted in results that clients set; "": it is not known, and
	// nobody does. nil: it never is.
	Caller func(ctx context.Context) (name, via string)
	// Failures has the results of failed actions, which are served in the
	// instances of action.FailedInstance; nil: there are none.
	Failures Failures
	// Execution is announced by Capabilities, for a server that executes too;
	// nil for one that does not. It must not be changed any more.
	Execution *repb.ExecutionCapabilities
	// MaxMessageBytes is the largest message that clients take unasked: 4 MiB
	// where it is 0, which is gRPC's default in all languages. Replies to batches
	// may be larger, up to what MaxBatchBytes makes of them.
	MaxMessageBytes int
	// MaxBatchBytes bounds the sum of the blobs in a batch, either way, and is at
	// most MaxBatch. 0 means half a MiB less than MaxMessageBytes. Above that, a
	// client that asks for as much must take messages as large.
	MaxBatchBytes int64
	// MaxBlobBytes bounds a blob that is uploaded; 0 means that only the store does.
	MaxBlobBytes int64
	// MaxPartialUploads is how many broken-off uploads are kept for being
	// resumed; 0 means 64. MaxPartialAge is for how long; 0 means 5 minutes.
	MaxPartialUploads int
	MaxPartialAge     time.Duration
	// MaxDecoders is how many uploads of large blobs are decompressed at once,
	// each with a window of up to 8 MiB; others wait. 0 means 16.
	MaxDecoders int
	// Logger gets what clients can't be told; nil discards it.
	Logger *slog.Logger
	// Registerer takes the metrics. nil: they are counted for nobody.
	Registerer prometheus.Registerer

	reads *reads
	pool  mem.BufferPool // of the buffers that blobs are read into
}

// withDefaults checks o and fills it in.
func (o Options) withDefaults() (Options, error) {
	if o.Store == nil || o.Actions == nil {
		return o, errors.New("rpc: Options need a Store and Actions")
	}
	if o.Stores == nil {
		shared := o.Store
		o.Stores = func(string) blob.Store { return shared }
	}
	o.Store = nil // from here on, every call asks for its instance's
	if o.MaxMessageBytes == 0 {
		o.MaxMessageBytes = defaultMaxMessageBytes
	}
	if o.MaxBatchBytes == 0 {
		o.MaxBatchBytes = int64(o.MaxMessageBytes - batchMargin)
	}
	if o.MaxBatchBytes <= 0 || o.MaxBatchBytes > MaxBatch {
		return o, fmt.Errorf("rpc: MaxBatchBytes is %d, want 1 to %d, which a message holds", o.MaxBatchBytes, MaxBatch)
	}
	if o.MaxBlobBytes < 0 {
		return o, errors.New("rpc: MaxBlobBytes may not be negative")
	}
	if o.Updates == nil {
		o.Updates = action.UpdatePolicy{}
	}
	if o.MaxPartialUploads == 0 {
		o.MaxPartialUploads = defaultMaxPartialUploads
	}
	if o.MaxPartialAge == 0 {
		o.MaxPartialAge = defaultPartialUploadTimeout
	}
	if o.MaxDecoders < 0 {
		return o, errors.New("rpc: MaxDecoders may not be negative")
	}
	if o.MaxDecoders == 0 {
		o.MaxDecoders = defaultMaxDecoders
	}
	if o.pool == nil {
		o.pool = wire.NewPool()
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	var err error
	o.reads, err = newReads(o.Registerer)
	return o, err
}

// maxReply bounds the reply to a batch, in bytes.
func (o *Options) maxReply() int64 {
	return max(int64(o.MaxMessageBytes), o.MaxBatchBytes+batchMargin)
}

// storeOf is the store of an instance, whose name it checks. The errors wrap
// resource.ErrInvalid.
func (o *Options) storeOf(instance string) (blob.Store, error) {
	if err := resource.CheckInstance(instance); err != nil {
		return nil, err //nolint:wrapcheck // it says what is wrong
	}
	return o.Stores(instance), nil
}

// Register checks the options, and registers the services with s before it
// serves. They are safe for concurrent use and start no goroutines that outlive
// a call.
func Register(s grpc.ServiceRegistrar, o Options) error {
	o, err := o.withDefaults()
	if err != nil {
		return err
	}
	codec, err := newCodec(o)
	if err != nil {
		return err
	}
	repb.RegisterCapabilitiesServer(s, &capabilitiesServer{o: o})
	s.RegisterService(casService(), &casServer{o: o, codec: codec, longLists: make(chan struct{}, maxLongLists)})
	repb.RegisterActionCacheServer(s, &actionCacheServer{o: o})
	if o.Assets != nil {
		registerAssets(s, o.Assets)
	}
	if o.LogStreams != nil {
		logpb.RegisterLogStreamServiceServer(s, &logStreamServer{logs: o.LogStreams, caller: o.Caller})
	}
	s.RegisterService(byteStreamService(), &byteStreamServer{o: o, codec: codec, uploads: newUploads(o)})
	return nil
}
