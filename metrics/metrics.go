// Package metrics is what an operator sees of a process: a registry of
// Prometheus metrics, an admin HTTP server (/metrics, /healthz, /readyz and
// /debug/pprof/), gRPC server interceptors that count, log and recover, and the
// slog logger.
//
// The mains wire it. Packages that have metrics of their own take a
// prometheus.Registerer in their Options and know nothing of this package. It
// defines no metric of storage or of execution, and keeps no state outside the
// values that it returns.
//
//	reg := metrics.NewRegistry()
//	rpc, err := metrics.NewRPC(metrics.RPCOptions{Prefix: "mettle", Registerer: reg, Logger: log})
//	srv := grpc.NewServer(rpc.ServerOptions()...)
//	admin, err := metrics.New(metrics.Options{Name: "mettle dual", Registry: reg, Ready: ready})
//	err = admin.Serve(ctx, listener)
package metrics

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// NewRegistry returns a registry with the collectors that every process has:
// the Go runtime's (go_*), the process's own (process_*) and the build's
// (go_build_info). The caller owns it; it is safe for concurrent use.
func NewRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister( // a new registry has nothing to clash with
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		collectors.NewBuildInfoCollector(),
	)
	return r
}
