package main

import "runtime"

// ballastBytes is room that nobody uses.
const ballastBytes = 32 << 20

// ballast makes the garbage collector run when some 35 MB were allocated since its
// last run, instead of the 5 MB that a server with little on its heap would have
// it run after. Each run takes as long as some ten actions do here; of a trivial
// action, this was 4 % of all that the machine did for it. It takes no memory by
// itself, since it is never written to; what it costs is up to 30 MB of garbage. On
// a large heap it makes no difference, and GOGC and GOMEMLIMIT hold as ever.
//
// The function that it returns is to be called at the end.
func ballast() (release func()) {
	b := make([]byte, ballastBytes)
	return func() { runtime.KeepAlive(b) }
}
