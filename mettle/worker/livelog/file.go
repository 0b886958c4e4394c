//go:build linux

package livelog

import (
	"context"
	"errors"
	"io"
	"math"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
)

const (
	// noLimit is for a command that still runs.
	noLimit = math.MaxInt64
	// piece is how much is sent at once.
	piece = 64 << 10
	// perTurn is how much of one file is sent before the other has its turn.
	perTurn = 1 << 20
	// maxLost is how many streams of a file may be lost: servers restart, but not over
	// and over while one command runs.
	maxLost = 5
	// callTimeout is for one call: a storage that is away must not hold up the end.
	callTimeout = 10 * time.Second
)

// file is one that is followed.
type file struct {
	path string
	f    *os.File // nil: not open

	name, writeName string
	offset          int64     // what the stream has
	heard           time.Time // when the stream heard of us last
	unsure          bool      // whether offset is right, because a call failed
	lost            int       // how many streams were
	given           bool      // up
}

func (x *file) close() {
	if x.f != nil {
		_ = x.f.Close() // opened for reading
		x.f = nil
	}
}

// follow sends what there is below limit, as far as the stream takes it now, and
// reports whether it has made the stream.
func (x *file) follow(ctx context.Context, l *Logs, instance string, limit int64) (made bool) {
	if x.given || x.f == nil && !x.open() {
		return false
	}
	st, err := x.f.Stat()
	if err != nil {
		x.give(ctx, l, err)
		return false
	}
	size := min(st.Size(), limit)
	if x.name == "" && size == 0 {
		// It may be one of before, in whose place the command's own is yet to come.
		x.close()
		return false
	}
	if x.name == "" {
		if made = x.create(ctx, l, instance); !made {
			return false
		}
	}
	end := min(size, x.offset+perTurn)
	for x.name != "" && !x.given {
		sign := time.Since(x.heard) >= l.o.Sign
		if x.offset >= end && !sign || !x.send(ctx, l, end) {
			break
		}
	}
	return made
}

// open opens the file if it is there, and a file: where commands have no user of
// their own, one may have put something else in its place.
func (x *file) open() bool {
	fd, err := unix.Open(x.path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		unix.Close(fd) //nolint:errcheck // opened for reading
		return false
	}
	x.f = os.NewFile(uintptr(fd), x.path)
	return true
}

func (x *file) create(ctx context.Context, l *Logs, instance string) bool {
	ctx, stop := context.WithTimeout(ctx, callTimeout)
	defer stop()
	name, writeName, err := l.o.Streams.Create(ctx, instance)
	if err != nil {
		x.failed(ctx, l, err)
		return false
	}
	x.name, x.writeName, x.heard = name, writeName, time.Now()
	return true
}

// send sends the next piece below end, or nothing but a sign of life, and reports
// whether that went well.
func (x *file) send(ctx context.Context, l *Logs, end int64) bool {
	ctx, stop := context.WithTimeout(ctx, callTimeout)
	defer stop()
	if x.unsure {
		n, ended, err := l.o.Streams.Status(ctx, x.writeName)
		if err != nil {
			x.failed(ctx, l, err)
			return false
		}
		if ended || n > end {
			x.given = true
			return false
		}
		x.offset, x.unsure = n, false
	}
	p := make([]byte, max(0, min(piece, end-x.offset)))
	n, err := x.f.ReadAt(p, x.offset)
	if err != nil && !errors.Is(err, io.EOF) {
		x.give(ctx, l, err)
		return false
	}
	committed, err := l.o.Streams.Append(ctx, x.writeName, x.offset, p[:n])
	if err != nil {
		x.failed(ctx, l, err)
		return false
	}
	x.offset, x.heard = committed, time.Now()
	return n > 0
}

// finish ends the stream.
func (x *file) finish(ctx context.Context, l *Logs) {
	for !x.given && x.name != "" {
		callCtx, stop := context.WithTimeout(ctx, callTimeout)
		err := l.o.Streams.Finish(callCtx, x.writeName, x.offset)
		stop()
		if err == nil {
			return
		}
		if x.failed(ctx, l, err); ctx.Err() != nil {
			return
		}
		t := time.NewTimer(l.o.Every)
		select {
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
}

// failed takes in that a call failed: it may be made again where the streams can't be
// reached; where the stream is there no more, because its server was restarted, another
// one has all of it again; and otherwise the file is given up.
func (x *file) failed(ctx context.Context, l *Logs, err error) {
	if errors.Is(err, blob.ErrNotFound) && x.name != "" && x.lost < maxLost {
		x.name, x.writeName, x.offset, x.unsure = "", "", 0, false
		x.lost++
		return
	}
	x.unsure = true
	if errors.Is(err, blob.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return
	}
	x.give(ctx, l, err)
}

// give gives the file up.
func (x *file) give(ctx context.Context, l *Logs, err error) {
	x.given = true
	l.o.Logger.DebugContext(ctx, "what a command prints can't be followed any more", "file", x.path, "offset", x.offset, "error", err)
}
