//go:build linux && race

package sim_test

// raceEnabled says that the scheduler chooses at random.
const raceEnabled = true

// defaultSeeds take some 20 s of two CPUs, each seed six times as long as without
// the race detector.
const defaultSeeds = 500
