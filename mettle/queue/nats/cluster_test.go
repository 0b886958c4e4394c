package nats_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/nats"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// newCluster starts three servers that hold each message three times, and returns
// them by their names.
func newCluster(t *testing.T) map[string]*broker {
	t.Helper()
	const n = 3
	ports := make([]int, n)
	var routes []*url.URL
	for i := range ports {
		// Each must know the others before they have started.
		l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // at once
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		ports[i] = l.Addr().(*net.TCPAddr).Port //nolint:forcetypeassert // as above
		routes = append(routes, &url.URL{Scheme: "nats", Host: l.Addr().String()})
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	servers := make(map[string]*broker)
	for i, port := range ports {
		name := fmt.Sprint("n", i)
		servers[name] = newBroker(t, func(o *server.Options) {
			o.ServerName, o.Routes = name, routes
			o.Cluster = server.ClusterOpts{Name: "cluster", Host: "127.0.0.1", Port: port}
		})
	}
	return servers
}

// leader is the name of the server that leads a stream.
func leader(t *testing.T, servers []string, stream string) string {
	t.Helper()
	nc, err := natsgo.Connect(servers[0])
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	return s.CachedInfo().Cluster.Leader
}

// Of three servers one is lost, the one that leads the jobs: none is lost, and
// none ends twice.
func TestQueue_clusterLosesItsLeader(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("an election takes several seconds")
	}
	cluster := newCluster(t)
	var servers []string
	for _, b := range cluster {
		servers = append(servers, b.url())
	}
	open := func(name string) *nats.Queue {
		o := nats.Options{
			Servers: servers, Prefix: "cl", Name: name, Replicas: 3,
			LeaseTime: 5 * time.Second, Heartbeat: 500 * time.Millisecond, Timeout: patience,
			Logger: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})).With("who", name),
		}
		q, err := nats.New(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { q.Close() })
		return q
	}
	api := open("")
	updates := receive(t, api)

	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	var g errgroup.Group
	for i := range 2 {
		worker := open(fmt.Sprint("worker-", i))
		g.Go(func() error {
			err := work(ctx, worker)
			t.Logf("worker %d has ended: %v", i, err)
			return err
		})
	}
	const jobs = 60
	g.Go(func() error {
		for i := range jobs {
			if err := api.Publish(ctx, job(fmt.Sprint("operations/", i))); err != nil {
				t.Errorf("publish job %d: %v", i, err)
				return err
			}
		}
		return nil
	})
	completed := make(map[string]bool)
	for len(completed) < jobs {
		select {
		case u := <-updates:
			if u.GetStage() != queuepb.Update_COMPLETED {
				continue
			}
			completed[u.GetOperation()] = true
			if len(completed) == jobs/3 {
				name := leader(t, servers, "cl_jobs")
				cluster[name].stop()
				t.Logf("%s led the jobs and is gone", name)
				for i, s := range servers {
					if s == cluster[name].url() {
						servers = append(servers[:i:i], servers[i+1:]...)
						break
					}
				}
			}
		case <-ctx.Done():
			t.Fatalf("only %d of %d jobs have ended: %v", len(completed), jobs, slices.Sorted(maps.Keys(completed)))
		}
	}
	cancel()
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// work runs jobs as a worker does, until ctx is done.
func work(ctx context.Context, q *nats.Queue) error {
	for ctx.Err() == nil {
		l, err := q.Lease(ctx, []string{"p"})
		if errors.Is(err, queue.ErrUnavailable) {
			continue
		} else if err != nil {
			return err
		}
		u := &queuepb.Update{Operation: l.Job().GetOperation(), Attempt: l.Attempt(), Stage: queuepb.Update_COMPLETED}
		if err := q.SendUpdate(ctx, l.Job().GetReplyTo(), u); err != nil {
			return err
		}
		if err := l.Ack(ctx); err != nil && !errors.Is(err, queue.ErrLeaseLost) && !errors.Is(err, queue.ErrUnavailable) {
			return err
		}
	}
	return nil
}
