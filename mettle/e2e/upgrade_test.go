package e2e_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
)

// releaseVar names a directory with the programs mettle and elan of another
// release, for the tests of this file and TestFleet_rolling.
const releaseVar = "METTLE_E2E_RELEASE"

// otherVersion is a directory with the programs of another version: of releaseVar,
// or else those of this tree under another name.
func otherVersion(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv(releaseVar); dir != "" {
		return dir
	}
	dir := t.TempDir()
	args := []string{"build", "-ldflags=-X main.version=another", "-o", dir + "/"}
	if raceEnabled {
		args = append(args, "-race")
	}
	cmd := exec.CommandContext(t.Context(), "go", append(args, "./mettle", "./elan")...)
	cmd.Dir = filepath.Join("..", "..")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	return dir
}

// release is the directory of releaseVar, without which the test is skipped.
func release(t *testing.T) string {
	t.Helper()
	dir := os.Getenv(releaseVar)
	if dir == "" {
		t.Skipf("%s names no directory with the programs of another release; make upgrade builds one", releaseVar)
	}
	return dir
}

// upgrade replaces all that a city consists of by the programs in a directory, in
// the order that deploy/UPGRADES.md names.
func (c *city) upgrade(dir string) {
	c.t.Helper()
	c.setUp(dir)
	for _, s := range slices.Concat(c.elans, c.workers, c.apis) {
		c.replace(s, dir)
	}
}

// setUp runs the mettle setup of a version.
func (c *city) setUp(dir string) {
	c.t.Helper()
	url, env := c.meet.flags(c.meet.addr)
	setup := commandIn(c.t, env, "setup", "--queue="+url)
	if dir != "" {
		setup.Path = filepath.Join(dir, "mettle")
	}
	if out, err := setup.CombinedOutput(); err != nil {
		c.t.Fatalf("mettle setup of %q: %v\n%s", dir, err, out)
	}
}

// replace ends a process as whoever replaces it would, and starts the other
// version in its place. It returns when that one is ready, as then the next is
// replaced.
func (c *city) replace(s *server, dir string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), startTimeout)
	defer cancel()
	if err := s.Terminate(ctx); err != nil {
		c.t.Errorf("%s ended with %v after SIGTERM", s.kind(), err)
	}
	s.version = dir
	s.Start()
	awaitReady(c.t, s)
}

// A mixture says of which version each part of a city is: true is the other one.
type mixture struct{ elan, api, worker bool }

// TestFleet_mixed builds with fleets of two releases, over each broker: every
// mixture of kinds, then some of each kind while processes are killed, and then all
// replaced under a build, there and back.
func TestFleet_mixed(t *testing.T) {
	old := release(t)
	for name, broker := range map[string]func(*testing.T) (meeting, *server){"nats": overNATS, "pubsub": overPubSub} {
		t.Run(name, func(t *testing.T) {
			c := newCity(t, broker)
			l := layers{Depth: 4, Width: 20, LargeEvery: 10, Marks: c.marks}
			for i := range 8 {
				m := mixture{elan: i&1 != 0, api: i&2 != 0, worker: i&4 != 0}
				t.Run(fmt.Sprintf("%+v", m), func(t *testing.T) {
					c.t = t // whose it is to fail
					c.become(m, old)
					l.Salt = fmt.Sprint("mixed", rand.Uint64()) //nolint:gosec // no secret
					b := newBazel(t)
					l.write(b)
					if r := <-c.build(b); r.err != nil {
						t.Fatalf("%v\n%s", r.err, r.out)
					}
					l.check(b)
				})
			}
			c.t = t
			for _, kind := range [][]*server{c.elans, c.workers, c.apis} {
				c.replace(kind[0], "") // the others are of the other release
			}
			c.chaos(t, 0)
			c.become(mixture{true, true, true}, old)
			l = layers{Depth: 6, Width: 30, Pause: 3, SlowPause: 50, SlowEvery: 25, LargeEvery: 20, Salt: fmt.Sprint("there", rand.Uint64()), Marks: c.marks} //nolint:gosec // no secret
			before, _ := c.executions()
			w := startWorks(c, l)
			for _, dir := range []string{"", old} {
				w.goOn(2 * time.Second)
				c.upgrade(dir)
			}
			w.goOn(2 * time.Second)
			w.end()
			marks, _ := c.executions()
			if marks -= before; marks != w.Actions() {
				t.Errorf("%d executions of %d actions", marks, w.Actions())
			}
			t.Logf("%d builds of %d actions under two rolling restarts: %d executions", w.builds, l.Actions(), marks)
		})
	}
}

// become has the parts be of the versions that m says, all at once.
func (c *city) become(m mixture, dir string) {
	c.t.Helper()
	version := func(other bool) string {
		if other {
			return dir
		}
		return ""
	}
	var wg sync.WaitGroup
	for _, part := range []struct {
		servers []*server
		version string
	}{{c.elans, version(m.elan)}, {c.workers, version(m.worker)}, {c.apis, version(m.api)}} {
		for _, s := range part.servers {
			if s.version != part.version {
				wg.Go(func() { c.replace(s, part.version) })
			}
		}
	}
	wg.Wait()
}

// TestShutdownDelay: a server that is told to end says so to balancers, and serves on
// for those that have not heard of it.
func TestShutdownDelay(t *testing.T) {
	f := newFleet(t)
	f.broker.Start()
	for _, s := range []*server{f.elan, f.api} {
		s.args = append(s.args, "--shutdown_delay=10m")
		s.Start()
	}
	awaitReady(t, f.api)
	for _, s := range []*server{f.api, f.elan} {
		if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		awaitNews(t, func() bool {
			code, said := readyz(t.Context(), s)
			return code == http.StatusServiceUnavailable && strings.Contains(said, "shutting down")
		}, s.kind()+" does not say that it ends")
		conn, err := client.Dial(t.Context(), s.Addr())
		if err != nil {
			t.Fatal(err)
		}
		c, err := client.New(client.Options{Conn: conn})
		if err != nil {
			t.Fatal(err)
		}
		d, err := blob.PutBytes(t.Context(), c, digest.SHA256, []byte("put while it ends"))
		if err != nil {
			t.Errorf("%s, which is to end in ten minutes: %v", s.kind(), err)
		}
		if missing, err := c.FindMissing(t.Context(), []digest.Digest{d}); err != nil || len(missing) > 0 {
			t.Errorf("%s: missing %v, %v", s.kind(), missing, err)
		}
		h, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
		if err != nil || h.GetStatus() != healthpb.HealthCheckResponse_NOT_SERVING {
			t.Errorf("the health of %s is %v, %v", s.kind(), h.GetStatus(), err)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}
}
