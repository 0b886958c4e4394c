// Package operation is what an API server knows of the operations that clients
// wait for: their names, which describe themselves (Name); what may happen to
// one and in which order (Machine, which knows no clock and does no I/O); and
// all of those in flight, which merge identical actions and show their newest
// state to everybody who waits (Registry).
//
// A name such as
//
//	operations/v1/{id}/{flags}/{function}/{hash}/{size}/{instance}
//
// says everything that is needed to take up an operation that nobody knows any
// more: an API server that restarted, or another one, looks in the ActionCache
// and otherwise enqueues the action again under the same name. So no operation
// is lost, and there is no database.
//
// Calls that are merged keep names of their own, and each is cancelled by its own
// (Wait); the operation ends when the last of them is. A name that was cancelled
// is remembered for some minutes, so that a client that comes back with it does
// not begin the work again.
//
// It speaks neither gRPC nor to a broker; mettle/api, its only caller, does.
package operation
