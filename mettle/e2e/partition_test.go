package e2e_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/client"
)

// A strait is the only way of some processes to the broker and the Elans.
type strait struct {
	broker    string
	storage   []string
	within    []string // the command by which processes are started there
	cut, mend func()
}

// roads are a strait that goes silent, which works everywhere.
func roads(t *testing.T, c *city) strait {
	t.Helper()
	return c.strait(t, "127.0.0.1")
}

func (c *city) strait(t *testing.T, host string) strait {
	t.Helper()
	all := []*road{newRoadFrom(t, host, c.meet.addr)}
	s := strait{broker: all[0].Addr()}
	for _, addr := range c.storage() {
		r := newRoadFrom(t, host, addr)
		all = append(all, r)
		s.storage = append(s.storage, r.Addr())
	}
	s.cut = func() {
		for _, r := range all {
			r.Cut()
		}
	}
	s.mend = func() {
		for _, r := range all {
			r.Mend()
		}
	}
	return s
}

// namespaces are a strait between two network namespaces, whose one link goes
// down: what the kernel does with packets then is all there.
func namespaces(t *testing.T, c *city) strait {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root makes network namespaces")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("no ip here; on Debian: apt-get install iproute2")
	}
	// Short enough for an interface's name, and apart for tests that run at once.
	id := fmt.Sprintf("mtl%d", os.Getpid()%100000)
	near, far, subnet := id+"a", id+"b", fmt.Sprintf("10.213.%d", os.Getpid()%250)
	t.Cleanup(func() {
		// The pair goes with the namespace in which one of it is.
		_ = exec.Command("ip", "netns", "del", id).Run() //nolint:noctx // the test's context is over
	})
	for _, args := range []string{
		"netns add " + id,
		"link add " + near + " type veth peer name " + far + " netns " + id,
		"addr add " + subnet + ".1/24 dev " + near,
		"link set " + near + " up",
		"-n " + id + " addr add " + subnet + ".2/24 dev " + far,
		"-n " + id + " link set " + far + " up",
		"-n " + id + " link set lo up",
	} {
		if out, err := exec.CommandContext(t.Context(), "ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Skipf("no network namespaces here: ip %s: %v: %s", args, err, out)
		}
	}
	s := c.strait(t, subnet+".1")
	s.within = []string{"ip", "netns", "exec", id}
	set := func(state string) func() {
		return func() {
			if out, err := exec.CommandContext(t.Context(), "ip", "link", "set", near, state).CombinedOutput(); err != nil {
				t.Errorf("ip link set %s %s: %v: %s", near, state, err, out)
			}
		}
	}
	s.cut, s.mend = set("down"), set("up")
	return s
}

// TestFleet_partition cuts a worker off from broker and storage for more than two
// leases. Its action is run by another one, and ends there. The worker goes on
// with its own, since it can't know that it is not the broker that is away, and
// kills it as soon as it hears; then it works again.
func TestFleet_partition(t *testing.T) {
	c := newCity(t, overNATS)
	conn, err := client.Dial(t.Context(), c.front.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	for name, way := range map[string]func(*testing.T, *city) strait{"silence": roads, "namespaces": namespaces} {
		t.Run(name, func(t *testing.T) { c.partition(t, conn, way(t, c)) })
	}
}

func (c *city) partition(t *testing.T, conn *grpc.ClientConn, s strait) {
	t.Helper()
	cutOff := c.worker(s.broker, s.storage)
	cutOff.within = s.within
	cutOff.Start()
	t.Cleanup(cutOff.Kill)
	dir := publicDir(t)
	if s.within == nil {
		awaitReady(t, cutOff)
	} else {
		time.Sleep(5 * time.Second) // its page can't be reached from here
	}
	// One that does nothing else, so that the action comes to this worker.
	for _, w := range c.workers {
		w.Kill()
	}
	beat := "f=$(mktemp -p " + dir + "); if mkdir " + dir + "/long; then for i in $(seq 1500); do echo $i > $f; sleep 0.1; done; fi; echo through > $f; echo 1 > out"
	ended := startAction(t, conn, beat)
	first := waitForOne(t, dir)
	s.cut()
	cutAt := time.Now()
	for _, w := range c.workers {
		w.Start()
	}
	wantOK(t, "the action of a worker that was cut off", ended)
	t.Logf("the action ended %.1f s after the cut", time.Since(cutAt).Seconds())
	if left := 2*cityLease + cityLease/2 - time.Since(cutAt); left > 0 {
		time.Sleep(left) // so that the worker has lost its lease in any case
	}
	s.mend()
	awaitNews(t, func() bool { return strings.Contains(cutOff.log.String(), "lease of a running job was lost") }, "the worker does not say that it lost its lease")
	if data, err := os.ReadFile(first); err != nil || strings.Contains(string(data), "through") {
		t.Errorf("the action of the worker that was cut off is at %q, %v; want it killed before its end", data, err)
	}
	runs, err := filepath.Glob(filepath.Join(dir, "tmp*"))
	if err != nil || len(runs) != 2 {
		t.Errorf("the action ran %d times, %v; want 2", len(runs), err)
	}
	// It is the only one again.
	for _, w := range c.workers {
		w.Kill()
	}
	wantOK(t, "an action after the partition", startAction(t, conn, "echo again > out; : "+dir))
	cutOff.Kill()
	for _, w := range c.workers {
		w.Start()
	}
}

// waitForOne waits until there is a file in dir, and returns its path.
func waitForOne(t *testing.T, dir string) string {
	t.Helper()
	var names []string
	awaitNews(t, func() bool {
		names, _ = filepath.Glob(filepath.Join(dir, "tmp*"))
		return len(names) > 0
	}, "no action began")
	return names[0]
}

// awaitNews waits until something is so.
func awaitNews(t *testing.T, so func() bool, otherwise string) {
	t.Helper()
	deadline := time.After(startTimeout)
	for !so() {
		select {
		case <-time.After(50 * time.Millisecond):
		case <-deadline:
			t.Fatal(otherwise)
		}
	}
}
