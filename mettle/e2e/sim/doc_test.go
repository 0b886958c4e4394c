//go:build linux

// Package sim_test is a fleet in one bubble of virtual time: API servers and
// workers as they are, over a broker and a network made for it, and clients that
// behave as Bazel does. A seed says how large the fleet is, what is built, and
// what goes wrong when: crashes, restarts, partitions, messages that are lost,
// late or come twice, outages of the broker and the store. What must hold
// whatever goes wrong is written beside the checks, in check_test.go. The README
// beside this file says how to run it and how to read a failure.
//
// Of the fleet, real are mettle/api with mettle/operation, mettle/worker with its
// input roots and outputs, elan/action and elan/blob/mem. Made here are: the
// broker, which keeps the promises of package queue and no more, in the two kinds
// that there are (sharedJobs as NATS and the memory queue have them, apartJobs as
// Pub/Sub does); what runs commands; gRPC, of which only streams and their
// ends are there.
//
// A seed decides everything that the simulation decides, and each decision
// depends on the seed and on what it is about, not on the order in which
// goroutines come to it (dice). So the same seed gives the same trace,
// though the scheduler is free. The tests in sim_test.go say how far that goes.
package sim_test
