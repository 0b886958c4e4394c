//go:build !race

package api_test

// race says that the race detector is on.
const race = false
