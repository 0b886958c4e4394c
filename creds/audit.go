package creds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

const (
	// refusals and refusalsAtOnce bound the records of calls that were refused: what is
	// let through has its rights and limits, but anybody can be refused, as often as he
	// likes, and would fill the disk.
	refusals       = rate.Limit(10)
	refusalsAtOnce = 100
	// maxAuditText bounds each text of a record that a caller chooses.
	maxAuditText = 512
)

// audits holds the records of refused calls to their limits: those of callers whom
// nobody knows to one of their own, so that they hide nobody else's.
type audits struct {
	unknown, known *rate.Limiter
	left           atomic.Int64 // records that were left out since the last one
	failing        atomic.Bool
}

func newAudits() audits {
	return audits{unknown: rate.NewLimiter(refusals, refusalsAtOnce), known: rate.NewLimiter(refusals, refusalsAtOnce)}
}

// audit writes what became of a call that is to be kept in mind.
func (c *call) audit(ctx context.Context, err error) {
	if !c.rule.audit {
		return
	}
	a := &c.g.audits
	if !c.allowed {
		limit := a.known
		if c.id == nil || c.id.Kind == anonymousName {
			limit = a.unknown
		}
		if !limit.Allow() {
			a.left.Add(1)
			c.g.metrics.unaudited.Inc()
			return
		}
	}
	r := slog.NewRecord(time.Now(), slog.LevelInfo, "call", 0)
	name, kind, who := "", "", ""
	if c.id != nil {
		name, kind, who = c.id.Name, c.id.Kind, c.id.For
	}
	from := ""
	if p, ok := peer.FromContext(ctx); ok {
		from = p.Addr.String()
	}
	r.AddAttrs(slog.String("identity", name), slog.String("by", kind))
	if who != "" {
		r.AddAttrs(slog.String("for", who))
	}
	r.AddAttrs(slog.String("peer", from), slog.String("method", short(c.method)), slog.String("instance", short(c.instance)), slog.String("code", status.Code(err).String()))
	if err != nil {
		r.AddAttrs(slog.String("error", short(status.Convert(err).Message())))
	}
	if n := a.left.Swap(0); n > 0 {
		r.AddAttrs(slog.Int64("left_out", n))
	}
	h := c.g.o.Audit.Handler()
	if !h.Enabled(ctx, r.Level) {
		return
	}
	if err := h.Handle(ctx, r); err == nil {
		a.failing.Store(false)
	} else if c.g.metrics.auditFailures.Inc(); !a.failing.Swap(true) {
		c.g.o.Logger.Error("the audit log can't be written, calls go on without it", "error", err)
	}
}

// short is text of a caller as a record has it.
func short(s string) string {
	if len(s) > maxAuditText {
		return fmt.Sprintf("%s… (%d bytes)", s[:maxAuditText], len(s))
	}
	return s
}

// AuditLog opens the log at path, as JSON lines; "-" is standard error. A file that was
// moved away, as for rotation, is begun anew within a second. The caller calls closeLog.
func AuditLog(path string) (log *slog.Logger, closeLog func() error, err error) {
	if path == "-" {
		return slog.New(slog.NewJSONHandler(os.Stderr, nil)), func() error { return nil }, nil
	}
	f := &auditFile{path: path}
	if err := f.open(); err != nil {
		return nil, nil, fmt.Errorf("audit log: %w", err)
	}
	return slog.New(slog.NewJSONHandler(f, nil)), f.close, nil
}

// auditFile is a file that is opened again when another one, or none, is in its place.
type auditFile struct {
	path string

	mu     sync.Mutex // guards what follows
	f      *os.File
	looked time.Time
}

func (a *auditFile) open() error {
	f, err := os.OpenFile(a.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	a.f, a.looked = f, time.Now()
	return nil
}

// Write implements io.Writer. slog calls it with one record at a time.
func (a *auditFile) Write(b []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var late error
	if time.Since(a.looked) > lookEvery {
		late = a.look() // what was open is written to
	}
	n, err := a.f.Write(b)
	return n, errors.Join(late, err)
}

// look opens the file again if it is no longer the one that is written.
func (a *auditFile) look() error {
	a.looked = time.Now()
	there, err := os.Stat(a.path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	mine, errMine := a.f.Stat()
	if errMine != nil {
		return errMine
	}
	if err == nil && os.SameFile(there, mine) {
		return nil
	}
	old := a.f
	if err := a.open(); err != nil {
		return err
	}
	return old.Close()
}

func (a *auditFile) close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.f.Close()
}

// warnExposed warns of a file with a secret that others of this machine can read.
func warnExposed(log *slog.Logger, path string) {
	if info, err := os.Stat(path); err == nil && info.Mode().Perm()&0o007 != 0 {
		log.Warn("every user of this machine can get at a file with a secret: chmod o-rwx", "file", path, "mode", info.Mode().Perm().String())
	}
}
