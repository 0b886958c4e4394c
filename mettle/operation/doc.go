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
// It speaks neither gRPC nor to a broker; mettle/api, its only caller, does.
package operation
