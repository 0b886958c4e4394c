//go:build linux

package sim_test

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"
)

//nolint:gochecknoglobals // flags
var (
	oneSeed  = flag.Uint64("seed", 0, "run this seed alone, and print what happens")
	numSeeds = flag.Int("seeds", defaultSeeds, "how many seeds to run")
	from     = flag.Uint64("from", 1, "the first of the seeds")
	mutate   = flag.Int("mutation", 0, "with -seed: the number of the bug to put in")
)

func TestMain(m *testing.M) {
	flag.Parse()
	// One at a time, so that what happens at one moment of virtual time happens
	// in one order, as far as there is a choice.
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(400) // a world is small and short-lived
	os.Exit(m.Run())
}

// tempDir is for the workers, in memory where the system has such a place.
func tempDir(t *testing.T) string {
	t.Helper()
	if dir, err := os.MkdirTemp("/dev/shm", "mettle-sim-"); err == nil { //nolint:usetesting // which is on a disk
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		return dir
	}
	return t.TempDir()
}

func TestSeeds(t *testing.T) {
	dir := tempDir(t)
	if *oneSeed != 0 {
		t.Log(newPlan(newDice(*oneSeed)))
		r := simulate(t, *oneSeed, mutation(*mutate), dir, true)
		t.Log("\n" + r.trace)
		for _, v := range r.violations {
			t.Error(v)
		}
		return
	}
	if *numSeeds > shard {
		runShards(t)
		return
	}
	start := time.Now()
	var all stats
	bad := 0
	for i := range *numSeeds {
		seed := *from + uint64(i) //nolint:gosec // a count
		r := simulate(t, seed, none, dir, false)
		all.add(r.stats)
		if len(r.violations) == 0 {
			continue
		}
		t.Errorf("%v\n%s\nagain: go test ./mettle/e2e/sim -run TestSeeds -v -args -seed %d", newPlan(newDice(seed)), r.violations[0], seed)
		if bad++; bad == 10 {
			t.Fatal("that is enough")
		}
	}
	took := time.Since(start)
	t.Logf("%d seeds in %v, %.0f a second: %+v", *numSeeds, took.Round(time.Millisecond), float64(*numSeeds)/took.Seconds(), all)
}

// shard is how many seeds one process runs: a bubble has one CPU.
const shard = 500

// runShards runs the seeds in processes of their own, as many at once as there are CPUs.
func runShards(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	var group errgroup.Group
	group.SetLimit(runtime.NumCPU())
	for first := 0; first < *numSeeds; first += shard {
		group.Go(func() error {
			cmd := exec.CommandContext(t.Context(), exe, "-test.run=^TestSeeds$", "-test.timeout=1h", //nolint:gosec // this very program
				"-seeds", fmt.Sprint(min(shard, *numSeeds-first)), "-from", fmt.Sprint(*from+uint64(first))) //nolint:gosec // a count
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
			return nil
		})
	}
	_ = group.Wait() // each has told its error
	took := time.Since(start)
	t.Logf("%d seeds in %v, %.0f a second", *numSeeds, took.Round(time.Millisecond), float64(*numSeeds)/took.Seconds())
}

// TestMutations: each bug that is put in is found, or the simulation is worth
// nothing.
func TestMutations(t *testing.T) {
	const enough = 400
	dir := tempDir(t)
	// One that has found it before, which saves time.
	first := map[mutation]uint64{ackFirst: 33, noFencing: 85, dropRequeued: 105}
	for m := none + 1; m < numMutations; m++ {
		t.Run(m.String(), func(t *testing.T) {
			for seed := max(first[m], 1); seed <= first[m]+enough; seed++ {
				if r := simulate(t, seed, m, dir, false); len(r.violations) > 0 {
					t.Logf("found by seed %d: %s", seed, r.violations[0])
					return
				}
			}
			t.Errorf("%d seeds don't find it", enough)
		})
	}
}

// TestSameSeed: a seed is worth something only if it says what happens. Where two
// goroutines are woken at one moment, the scheduler may have it either way, once in
// a while, on a busy machine: then some more runs have to agree.
func TestSameSeed(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector has the scheduler choose at random")
	}
	const tries = 4
	dir := tempDir(t)
	again := 0
	for seed := uint64(1); seed <= 24; seed++ {
		first := simulate(t, seed, none, dir, true).trace
		if first == "" {
			t.Fatal("nothing is recorded")
		}
		other := ""
		for try := 0; try < tries && first != other; try++ {
			other = simulate(t, seed, none, dir, true).trace
			again += min(try, 1)
		}
		if first != other {
			d := cmp.Diff(strings.Split(first, "\n"), strings.Split(other, "\n"))
			t.Errorf("%v: no two runs are the same:\n%.2000s", newPlan(newDice(seed)), d)
		}
	}
	t.Logf("%d more runs than two for each seed", again)
}
