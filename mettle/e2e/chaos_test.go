package e2e_test

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mettle-build/mettle/metrics/logtest"
	"github.com/mettle-build/mettle/mettle/queue/pubsub/pubsubtest"
)

// A city is a fleet with several of everything: 2 API servers behind one address,
// 3 workers and 2 Elans over one bucket. Each part is a process.
type city struct {
	t       *testing.T
	broker  *server // nil where it is not to be killed
	meet    meeting
	bucket  *server
	elans   []*server
	apis    []*server
	workers []*server
	front   *road // to the API servers
	marks   string
	uids    int
}

// A meeting is the broker that a city meets at.
type meeting struct {
	addr string
	// flags are those of a process that gets to the broker at addr, and what is
	// to be in its environment.
	flags func(addr string) (url string, env []string)
}

// cityLease is short, so that what a killed worker had is soon with another. It is
// the shortest that Pub/Sub has.
const cityLease = 10 * time.Second

func overNATS(t *testing.T) (meeting, *server) {
	t.Helper()
	return overNATSWith(t, cityLease)
}

func overNATSWith(t *testing.T, lease time.Duration) (meeting, *server) {
	t.Helper()
	s := newNATS(t)
	s.Start()
	return meeting{s.Addr(), func(addr string) (string, []string) {
		return "nats://" + addr + "/city?lease=" + lease.String(), nil
	}}, s
}

func overPubSub(t *testing.T) (meeting, *server) {
	t.Helper()
	p := pubsubtest.Start(t)
	return meeting{p.Addr, func(addr string) (string, []string) {
		return "gcppubsub://city/city?lease=" + cityLease.String(), []string{"PUBSUB_EMULATOR_HOST=" + addr}
	}}, nil
}

func overCluster(cluster natsCluster) func(*testing.T) (meeting, *server) {
	return func(*testing.T) (meeting, *server) {
		return meeting{cluster.addrs(), func(addr string) (string, []string) {
			return "nats://" + addr + "/city?replicas=3&lease=" + cityLease.String(), nil
		}}, nil
	}
}

// newCity builds a city, all of whose processes run.
func newCity(t *testing.T, broker func(*testing.T) (meeting, *server)) *city {
	t.Helper()
	c := &city{t: t, bucket: newBucket(t), marks: publicDir(t)}
	c.meet, c.broker = broker(t)
	c.bucket.Start()
	url, env := c.meet.flags(c.meet.addr)
	setup := commandIn(t, env, "setup", "--queue="+url)
	if out, err := setup.CombinedOutput(); err != nil {
		t.Fatalf("mettle setup: %v\n%s", err, out)
	}
	for range 2 {
		s := newServer(t, "elan", []string{"--storage=s3://" + bucketName + "/elan?region=here&path_style=true&endpoint=http://" + c.bucket.Addr()})
		s.args = append(s.args, "--port="+strconv.Itoa(s.Port))
		s.env = []string{"AWS_ACCESS_KEY_ID=id", "AWS_SECRET_ACCESS_KEY=secret"}
		c.elans = append(c.elans, s)
	}
	var fronts []string
	for range 2 {
		s := c.server(c.meet.addr, c.storage(), "api")
		s.args = append(s.args, "--port="+strconv.Itoa(s.Port))
		c.apis = append(c.apis, s)
		fronts = append(fronts, s.Addr())
	}
	for range 3 {
		c.workers = append(c.workers, c.worker(c.meet.addr, c.storage()))
	}
	c.front = newRoad(t, fronts...)
	for _, s := range c.servers() {
		s.Start()
	}
	for _, s := range c.servers() {
		awaitReady(t, s)
	}
	return c
}

// storage is where the Elans are.
func (c *city) storage() []string {
	var addrs []string
	for _, s := range c.elans {
		addrs = append(addrs, s.Addr())
	}
	return addrs
}

// server is a process, not started, that gets to the broker and the Elans there.
func (c *city) server(broker string, storage []string, command string, flags ...string) *server {
	c.t.Helper()
	url, env := c.meet.flags(broker)
	s := newServer(c.t, "mettle", append([]string{command, "--queue=" + url, "--storage=" + strings.Join(storage, ",")}, flags...))
	s.env = env
	return s
}

// worker is server for one more worker.
func (c *city) worker(broker string, storage []string) *server {
	c.t.Helper()
	c.uids += 10 // each has users of its own for its slots, as those on one machine must
	// How often actions run, they tell outside.
	s := c.server(broker, storage, "worker", "--sandbox=bare", "--slots=3", "--dir="+storeDir(c.t), "--uid_base="+strconv.Itoa(64000+c.uids))
	s.says = "Metrics, health"
	return s
}

// servers are all processes of ours.
func (c *city) servers() []*server { return slices.Concat(c.elans, c.apis, c.workers) }

// remote are the flags of a build by the whole city. That many retries are what
// somebody sets who expects servers to be replaced under a build.
func (c *city) remote(b *bazel) []string {
	return append(b.remoteAt(c.front.Addr()), "--remote_retries=30", "--jobs=48")
}

// build begins a build, which gives its output and status to the channel.
func (c *city) build(b *bazel) <-chan bazelResult {
	ended := make(chan bazelResult, 1) // one value, and the goroutine never waits
	ctx, cancel := context.WithTimeout(c.t.Context(), bazelTimeout)
	cmd := b.command(ctx, "build", append(c.remote(b), "//layers:all")...)
	log := &logtest.Buffer{}
	cmd.Stdout, cmd.Stderr = log, log
	go func() {
		defer cancel()
		err := cmd.Run()
		ended <- bazelResult{log.String(), err}
	}()
	return ended
}

type bazelResult struct {
	out string
	err error
}

// disturb kills a process after the other, and starts each again, until the build
// has ended. It returns how many of each kind it killed.
func (c *city) disturb(ended <-chan bazelResult, rng *rand.Rand) (bazelResult, map[string]int) {
	victims := c.servers()
	if c.broker != nil {
		victims = append(victims, c.broker)
	}
	if os.Getenv(gatewayVar) != "" { // else what is in it would be gone
		victims = append(victims, c.bucket)
	}
	kills := map[string]int{}
	seen, _ := c.executions()
	for {
		select {
		case r := <-ended:
			return r, kills
		case <-time.After(time.Duration(1000+rng.IntN(3000)) * time.Millisecond):
		}
		// A fleet on a slow machine would not come to anything if it were disturbed by
		// the clock alone, and the attempts of its jobs would be used up.
		now, _ := c.executions()
		if now == seen {
			continue
		}
		some := []*server{victims[rng.IntN(len(victims))]}
		if rng.IntN(4) == 0 { // two at once
			if other := victims[rng.IntN(len(victims))]; other != some[0] {
				some = append(some, other)
			}
		}
		for _, s := range some {
			s.Kill()
			kills[s.kind()]++
			c.t.Logf("killed a process of %s", s.kind())
		}
		time.Sleep(time.Duration(rng.IntN(1500)) * time.Millisecond) // until somebody replaces it
		for _, s := range some {
			s.Start()
		}
		seen = now
	}
}

// executions counts how often each action began, by the marks that it leaves.
func (c *city) executions() (marks, actions int) {
	c.t.Helper()
	seen := map[string]int{}
	err := filepath.WalkDir(c.marks, func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			name, _, _ := strings.Cut(filepath.Base(path), ".")
			seen[name]++
			marks++
		}
		return err
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return marks, len(seen)
}

// chaosRounds is how many builds are disturbed: METTLE_CHAOS_ROUNDS, or one.
func chaosRounds() int {
	if n, err := strconv.Atoi(os.Getenv("METTLE_CHAOS_ROUNDS")); err == nil {
		return n
	}
	return 1
}

// TestFleet_chaos builds some hundreds of actions, while processes are killed
// that take part, one or two every few seconds. METTLE_CHAOS_SEED repeats a
// schedule, as far as the processes do.
func TestFleet_chaos(t *testing.T) {
	for name, broker := range map[string]func(*testing.T) (meeting, *server){"nats": overNATS, "pubsub": overPubSub} {
		t.Run(name, func(t *testing.T) {
			c := newCity(t, broker)
			for round := range chaosRounds() {
				c.chaos(t, round)
			}
		})
	}
}

func (c *city) chaos(t *testing.T, round int) {
	t.Helper()
	seed := rand.Uint64()
	if s, err := strconv.ParseUint(os.Getenv("METTLE_CHAOS_SEED"), 10, 64); err == nil {
		seed = s + uint64(round) //nolint:gosec // a small number
	}
	t.Logf("round %d: seed %d", round, seed)
	rng := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // no secret
	l := layers{Depth: 6, Width: 50, Pause: 1, SlowPause: 30, SlowEvery: 40, LargeEvery: 10, Salt: fmt.Sprint("salt", seed), Marks: c.marks}
	b := newBazel(t)
	l.write(b)
	before, _ := c.executions()
	start := time.Now()
	r, kills := c.disturb(c.build(b), rng)
	if r.err != nil {
		t.Fatalf("round %d, seed %d: the build ended with %v; killed %v\n%s", round, seed, r.err, kills, r.out)
	}
	l.check(b)
	marks, _ := c.executions()
	t.Logf("round %d: %d actions in %.1f s, %d executions, killed %v", round, l.Actions(), time.Since(start).Seconds(), marks-before, kills)
	if len(kills) == 0 {
		t.Error("nothing was killed: the build was too short")
	}
	// What was reported is stored: another client is told all of it.
	again := newBazel(t)
	l.write(again)
	if r := <-c.build(again); r.err != nil {
		t.Fatalf("round %d: the second build ended with %v\n%s", round, r.err, r.out)
	} else {
		checkOnly(t, r.out, "remote cache hit")
	}
	l.check(again)
}
