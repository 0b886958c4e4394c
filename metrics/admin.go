package metrics

import (
	"context"
	"errors"
	"fmt"
	"html/template"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

const (
	// headerTimeout bounds the reading of a request's header, so that clients
	// that say nothing hold no connection for ever.
	headerTimeout = 10 * time.Second
	// idleTimeout is longer than the usual scrape interval of a minute, so that
	// Prometheus keeps its connection.
	idleTimeout = 2 * time.Minute
	// writeTimeout bounds one answer. A CPU profile or a trace takes as many
	// seconds as its client asked for, up to this.
	writeTimeout = 5 * time.Minute
	// readyTimeout bounds one readiness check: a probe that gets no answer is
	// counted as failed, but says less than an error does.
	readyTimeout = 5 * time.Second
	// maxConns is how many connections are served at once; more wait until one of
	// these ends, which the timeouts see to.
	maxConns = 256
	// shutdownTimeout is how long requests in flight may take after ctx ends.
	shutdownTimeout = 2 * time.Second
)

// Options configure a Server. The zero Options are valid.
type Options struct {
	// Name stands on the index page. Default: "admin".
	Name string
	// Version is the program's, for the index page. "": it is not told.
	Version string
	// Registry is what /metrics shows. Default: a NewRegistry.
	Registry *prometheus.Registry
	// Ready tells whether the process can take work; its error is shown by
	// /readyz. It is called concurrently, with a deadline of a few seconds.
	// Default: always ready.
	Ready func(context.Context) error
	// Notes are lines that /readyz shows when the process is ready, on what works
	// and yet needs a look. It is called concurrently, and quick. Default: none.
	Notes func() []string
	// Pages are served beside those of this package. Default: none.
	Pages []Page
	// Tables are shown by the index page, as they are when it is asked for. It is
	// called concurrently. Default: none.
	Tables func(context.Context) ([]Table, error)
	// Logger takes what goes wrong while serving. Default: none.
	Logger *slog.Logger
}

// A Server answers the operator's HTTP requests. It is safe for concurrent use.
type Server struct {
	name    string
	version string
	reg     *prometheus.Registry
	ready   func(context.Context) error
	notes   func() []string
	pages   []Page
	table   func(context.Context) ([]Table, error)
	index   *template.Template
	log     *slog.Logger
}

// New returns a Server. It starts nothing, and fails never with valid Options.
func New(o Options) (*Server, error) {
	s := &Server{name: o.Name, version: o.Version, reg: o.Registry, ready: o.Ready, notes: o.Notes, pages: o.Pages, table: o.Tables, log: o.Logger}
	var err error
	if s.index, err = parseIndex(); err != nil {
		return nil, err
	}
	if s.name == "" {
		s.name = "admin"
	}
	if s.reg == nil {
		s.reg = NewRegistry()
	}
	if s.ready == nil {
		s.ready = func(context.Context) error { return nil }
	}
	if s.notes == nil {
		s.notes = func() []string { return nil }
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	return s, nil
}

// Handler returns the handler of all pages, for those that bring their own
// HTTP server.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.reg, promhttp.HandlerOpts{
		ErrorLog:      slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
		ErrorHandling: promhttp.ContinueOnError,
		// One scrape a second from two servers is plenty; more wait in line.
		MaxRequestsInFlight: 4,
		// To those who ask for it, and so get exemplars.
		EnableOpenMetrics: true,
	}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { plain(w, http.StatusOK, "ok") })
	mux.HandleFunc("GET /readyz", s.serveReady)
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", serveCommandLine)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("POST /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	for _, p := range s.pages {
		mux.Handle("GET "+p.Path, p.Handler)
	}
	mux.HandleFunc("GET /{$}", s.serveIndex)
	return guarded(mux)
}

func (s *Server) serveReady(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), readyTimeout)
	defer cancel()
	if err := s.ready(ctx); err != nil {
		plain(w, http.StatusServiceUnavailable, err.Error())
		return
	}
	plain(w, http.StatusOK, strings.Join(append([]string{"ok"}, s.notes()...), "\n"))
}

func plain(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_, _ = fmt.Fprintln(w, text) // the client may have gone
}

// Serve answers on l until ctx ends, then gives requests in flight two
// seconds, and returns nil once all its goroutines have ended. It closes l. An
// error is one of the listener.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	// The requests end with the server: a profile that is being taken must not
	// hold up the shutdown.
	requests, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	h := &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       headerTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return requests },
	}
	served := make(chan error, 1) // one value, so that the goroutine never waits for its reader
	go func() { served <- h.Serve(netutil.LimitListener(l, maxConns)) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve admin pages on %v: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	grace, done := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer done()
	if err := h.Shutdown(grace); err != nil {
		cancel()
		err = errors.Join(err, h.Close())
		s.log.Debug("admin requests cut off at shutdown", "error", err)
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve admin pages on %v: %w", l.Addr(), err)
	}
	return nil
}
