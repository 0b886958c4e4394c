package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/instances"
	"github.com/mettle-build/mettle/elan/blob/retry"
	"github.com/mettle-build/mettle/elan/blob/tiered"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/metrics"
)

// storageFlags are those of all whose storage is another server.
type storageFlags struct {
	Storage string `help:"The storage: the address of an elan, HOST:PORT, or of several that have the same blobs and take turns, by commas or as dns:///NAME:PORT." placeholder:"HOST:PORT"`

	flags.Caller `embed:"" prefix:"storage_"`

	targets      []string // set by check
	dial         []grpc.DialOption
	compressFrom int64 // see client.Options
}

func (f *storageFlags) check() (err error) {
	const want = "want HOST:PORT of an elan, or of several, by commas"
	if f.Storage == "" {
		return errors.New("--storage: none is named, " + want)
	}
	addresses, dial, err := f.Dial(f.Storage, nil)
	if err != nil {
		return fmt.Errorf("--storage: %w", err)
	}
	f.dial = dial
	if f.targets, err = client.ParseTargets(addresses); err != nil {
		return fmt.Errorf("--storage: %w", err)
	}
	for _, t := range f.targets {
		host, port, err := net.SplitHostPort(t[strings.LastIndexByte(t, '/')+1:])
		if scheme, _, found := strings.Cut(t, "://"); err != nil || host == "" || port == "" || found && scheme != "dns" {
			return fmt.Errorf("--storage: %q is no server's address, %s", t, want)
		}
	}
	return nil
}

// here reports whether a server of the storage is named as this machine's own.
func (f *storageFlags) here() bool {
	return slices.ContainsFunc(f.targets, isHere)
}

func isHere(target string) bool {
	host, _, _ := net.SplitHostPort(target[strings.LastIndexByte(target, '/')+1:]) // check has done so
	return host == "localhost" || net.ParseIP(host).IsLoopback()
}

// passCredentials reports whether the storage may have what clients show of
// themselves: it is asked over connections that nobody else reads, in nobody's name.
func (f *storageFlags) passCredentials() bool {
	elsewhere := slices.ContainsFunc(f.targets, func(t string) bool { return !isHere(t) })
	return !f.ownName() && (f.Encrypted(f.Storage) || !elsewhere)
}

// ownName reports whether the storage is called in this server's own name.
func (f *storageFlags) ownName() bool { return f.TokenFile != "" || f.TLSCert != "" }

// connect is a connection to the storage, which need not be there yet.
func (f *storageFlags) connect(opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	return client.Connect(f.targets, append(slices.Clip(f.dial), opts...)...)
}

// remoteStorage is another server's storage, as the parts here use it. Its calls
// wait for a server that is away, for a while.
type remoteStorage struct {
	conn      *grpc.ClientConn
	patient   *retry.Retrier
	instances *client.Instances
	actions   retry.ActionCache // of all instances
	failures  client.Failures   // of all instances
	logs      client.LogStreams // of all instances
}

// open makes the parts. The storage need not be there.
func (f *storageFlags) open(log *slog.Logger, registry *prometheus.Registry, opts ...grpc.DialOption) (*remoteStorage, error) {
	patient, err := retry.New(retry.Options{Logger: log, Registerer: registry})
	if err != nil {
		return nil, err
	}
	if err := f.Watch(registry, "storage"); err != nil {
		return nil, err
	}
	calls, err := metrics.NewClient(metrics.ClientOptions{Prefix: "mettle_storage", Registerer: registry})
	if err != nil {
		return nil, err
	}
	conn, err := f.connect(append(opts, grpc.WithStatsHandler(calls))...)
	if err != nil {
		return nil, err
	}
	s := &remoteStorage{conn: conn, patient: patient}
	if s.instances, err = client.NewInstances(client.Options{Conn: conn, CompressFrom: f.compressFrom}); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	all := s.instances.Of("") // results' keys name their instances
	s.actions, s.failures, s.logs = patient.Actions(all), all.Failures(), all.LogStreams()
	return s, nil
}

// of is the blobs of an instance.
func (s *remoteStorage) of(instance string) blob.Store {
	return s.patient.Store(s.instances.Of(instance))
}

// ready asks for a sign of life.
func (s *remoteStorage) ready(ctx context.Context) error {
	_, err := repb.NewCapabilitiesClient(s.conn).GetCapabilities(ctx, &repb.GetCapabilitiesRequest{})
	if err != nil {
		return errors.New(status.Convert(err).Message())
	}
	return nil
}

func (s *remoteStorage) close() error { return s.conn.Close() }

// cacheOptions are those of withCache.
type cacheOptions struct {
	dir               string
	maxBytes, minFree int64
	log               *slog.Logger
	registry          *prometheus.Registry
}

// cacheLifetime is for how long what is in a worker's cache stays at least:
// hardly, so that what is used now pushes out what was.
const cacheLifetime = time.Minute

// cachedStorage is the storage with a directory of this machine in front, from
// which inputs are hard links. What it has is kept apart by instances, whether the
// storage does so or not: an action is given nothing that its instance has not.
type cachedStorage struct {
	tiers   tiered.Closer
	cache   *file.Store
	remote  *remoteStorage
	through *instances.Stores
}

func (s *remoteStorage) withCache(ctx context.Context, o cacheOptions) (*cachedStorage, error) {
	cache, err := file.New(file.Options{
		Dir: o.dir, MaxBytes: o.maxBytes, MinFreeBytes: o.minFree, MinLifetime: cacheLifetime, Logger: o.log, Registerer: o.registry,
	})
	if err != nil {
		return nil, err
	}
	tiers, err := tiered.New(ctx, tiered.Options{
		Tiers:  []tiered.Tier{{Name: "cache", Store: cache}, {Name: "storage", Store: s.patient.Store(s.instances)}},
		Logger: o.log, Registerer: o.registry,
	})
	if err != nil {
		return nil, errors.Join(err, cache.Close())
	}
	return &cachedStorage{tiers: tiers, cache: cache, remote: s, through: instances.Over(tiers)}, nil
}

// of is the blobs of an instance.
func (c *cachedStorage) of(instance string) blob.Store {
	c.remote.instances.Of(instance) // so that its name is known where only its space is told
	return c.through.Of(instance)
}

// close ends the tiers, and then the directory.
func (c *cachedStorage) close() error { return errors.Join(c.tiers.Close(), c.cache.Close()) }
