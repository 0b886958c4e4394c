//go:build linux && !race

package sim_test

// defaultSeeds take some 20 s of two CPUs.
const defaultSeeds = 3000
