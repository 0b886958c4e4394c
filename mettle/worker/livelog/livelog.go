//go:build linux

// Package livelog lets people watch what a command prints: it follows the files that
// its stdout and stderr go to, and copies what comes into log streams, which others
// read (elan/logstream).
//
// It costs a command that is over soon nothing: it looks at the files only when the
// command has run for Options.After, and makes a stream when there is something in
// one. Nothing that goes wrong here is the command's trouble, nor its client's: the
// result has all that was printed. A log that is too large for a stream, or a storage
// that does not take it, is followed no longer.
//
// The executor of a slot calls it, in mettle/worker.
package livelog

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"
)

// Streams are where the streams are: elan/logstream, or another server's by
// elan/client.
type Streams interface {
	// Create makes a stream of an instance. Readers are told name; writeName is for
	// the other calls.
	Create(ctx context.Context, instance string) (name, writeName string, err error)
	// Append appends data at offset, which is how many bytes the stream has, and
	// returns how many it has then. To append nothing tells that the writer is there.
	Append(ctx context.Context, writeName string, offset int64, data []byte) (int64, error)
	// Finish ends a stream that has offset bytes.
	Finish(ctx context.Context, writeName string, offset int64) error
	// Status is how many bytes the stream has, and whether it has ended.
	Status(ctx context.Context, writeName string) (committed int64, ended bool, err error)
}

// Options are those of New.
type Options struct {
	// Streams take what is printed. Required.
	Streams Streams
	// After is how long a command has run before its output is looked at. 0: a second.
	After time.Duration
	// Every is how often it is looked at from then on. 0: 200 ms.
	Every time.Duration
	// Sign is how often a stream hears from a command that prints nothing, well below
	// what makes it think that the writer has gone. 0: 15 s.
	Sign time.Duration
	// Grace is how long the end of a command waits for the end of its streams. 0: 2 s.
	Grace time.Duration
	// Logger gets what an operator should know. Default: discard.
	Logger *slog.Logger
}

// Logs follow commands. They are safe for concurrent use.
type Logs struct{ o Options }

// New checks the options.
func New(o Options) (*Logs, error) {
	if o.Streams == nil {
		return nil, errors.New("live logs: Options need Streams")
	}
	if o.After < 0 || o.Every < 0 || o.Sign < 0 || o.Grace < 0 {
		return nil, errors.New("live logs: negative time")
	}
	o.After = cmp.Or(o.After, time.Second)
	o.Every = cmp.Or(o.Every, 200*time.Millisecond)
	o.Sign = cmp.Or(o.Sign, 15*time.Second)
	o.Grace = cmp.Or(o.Grace, 2*time.Second)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Logs{o: o}, nil
}

// Names are the names of a command's streams; an empty one is not there, or not yet.
type Names struct{ Stdout, Stderr string }

// Command is a command that begins.
type Command struct {
	Instance string
	// Stdout and Stderr are the paths of the files that it writes to, which need not
	// be there yet.
	Stdout, Stderr string
	// Announce is told the names when there is one more, by the follower's goroutine.
	// It may take its time.
	Announce func(ctx context.Context, n Names)
}

// Follow follows a command that begins now, until End and Wait. It does not depend on
// the command's end, nor on ctx's, which only brings values. l may be nil: nothing is
// followed then.
func (l *Logs) Follow(ctx context.Context, c Command) *Follower {
	if l == nil {
		return nil
	}
	f := &Follower{l: l, over: make(chan struct{}), done: make(chan struct{})}
	ctx, f.cancel = context.WithCancel(context.WithoutCancel(ctx))
	f.timer = time.AfterFunc(l.o.After, func() {
		defer close(f.done)
		f.run(ctx, c)
	})
	return f
}

// Follower follows one command.
type Follower struct {
	l      *Logs
	timer  *time.Timer
	cancel context.CancelFunc
	once   sync.Once
	over   chan struct{} // closed by End
	done   chan struct{} // closed when nothing goes on any more
	end    End           // valid when over is closed
}

// End is how a command has ended.
type End struct {
	// StdoutBytes and StderrBytes are the sizes of the files: what is behind belongs
	// to another command.
	StdoutBytes, StderrBytes int64
	// Elsewhere says that the command runs again on another worker: its streams are
	// not finished, so that nobody takes for its output what there is.
	Elsewhere bool
}

// End says that the command has ended: what there is goes to the streams, which are
// finished then. It does not wait for that. Only the first End counts.
func (f *Follower) End(e End) {
	if f == nil {
		return
	}
	f.once.Do(func() {
		if f.timer.Stop() {
			close(f.done)
		}
		f.end = e
		close(f.over)
	})
}

// Wait returns when nothing is followed any more, soon after End, which it calls for
// who has not. After that the files may be used for something else.
func (f *Follower) Wait() {
	if f == nil {
		return
	}
	f.End(End{Elsewhere: true})
	select {
	case <-f.done: // mostly
	default:
		late := time.NewTimer(f.l.o.Grace)
		defer late.Stop()
		select {
		case <-f.done:
		case <-late.C:
		}
	}
	f.cancel()
	<-f.done
}

// run follows both files until the command has ended.
func (f *Follower) run(ctx context.Context, c Command) {
	files := [2]*file{{path: c.Stdout}, {path: c.Stderr}}
	defer func() {
		for _, x := range files {
			x.close()
		}
	}()
	tick := time.NewTicker(f.l.o.Every)
	defer tick.Stop()
	for {
		made := false
		for _, x := range files {
			made = x.follow(ctx, f.l, c.Instance, noLimit) || made
		}
		if made {
			c.Announce(ctx, Names{files[0].name, files[1].name})
		}
		select {
		case <-tick.C:
		case <-f.over:
			f.last(ctx, c, files)
			return
		}
	}
}

// last sends what is left, unless the command goes on elsewhere.
func (f *Follower) last(ctx context.Context, c Command, files [2]*file) {
	if f.end.Elsewhere {
		return
	}
	for i, size := range []int64{f.end.StdoutBytes, f.end.StderrBytes} {
		if files[i].name == "" {
			continue // for what came so late there is the result
		}
		for !files[i].given && files[i].name != "" && files[i].offset < size && ctx.Err() == nil {
			before := files[i].offset
			files[i].follow(ctx, f.l, c.Instance, size)
			if files[i].offset == before && !f.retry(ctx) {
				break
			}
		}
		files[i].finish(ctx, f.l)
	}
}

// retry waits for a moment, and reports whether there is still time.
func (f *Follower) retry(ctx context.Context) bool {
	t := time.NewTimer(f.l.o.Every)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
