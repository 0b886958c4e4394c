//go:build linux && !race

package sim_test

// raceEnabled says that the scheduler chooses at random.
const raceEnabled = false

// defaultSeeds take some 20 s of two CPUs.
const defaultSeeds = 3000
