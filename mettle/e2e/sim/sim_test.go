//go:build linux

package sim_test

import (
	"flag"
	"os"
	"runtime"
	"testing"
	"time"
)

//nolint:gochecknoglobals // flags
var (
	oneSeed  = flag.Uint64("seed", 0, "run this seed alone, and print what happens")
	numSeeds = flag.Int("seeds", 500, "how many seeds to run")
	from     = flag.Uint64("from", 1, "the first of the seeds")
	mutate   = flag.Int("mutation", 0, "with -seed: the number of the bug to put in")
)

func TestMain(m *testing.M) {
	flag.Parse()
	// One at a time, so that what happens at one moment of virtual time happens
	// in one order, as far as there is a choice.
	runtime.GOMAXPROCS(1)
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

// TestMutations: each bug that is put in is found, or the simulation is worth
// nothing.
func TestMutations(t *testing.T) {
	const enough = 400
	dir := tempDir(t)
	for m := none + 1; m < numMutations; m++ {
		t.Run(m.String(), func(t *testing.T) {
			for seed := uint64(1); seed <= enough; seed++ {
				if r := simulate(t, seed, m, dir, false); len(r.violations) > 0 {
					t.Logf("found by seed %d: %s", seed, r.violations[0])
					return
				}
			}
			t.Errorf("%d seeds don't find it", enough)
		})
	}
}
