//go:build linux

package persistent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/command"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
	"github.com/mettle-build/mettle/mettle/worker/runner"
	persistentpb "github.com/mettle-build/mettle/proto/persistent"
)

// errProcess: the process failed, and another one may do better.
var errProcess = errors.New("the persistent worker failed")

// process is one process of a tool, with its root. It is used by one goroutine at a
// time, and ended once.
type process struct {
	key         key
	dir         string // its own
	root        string // in dir: where it runs
	next        string // in dir: where the inputs of the next action are made
	owner       inputroot.Owner
	maxResponse int64

	answered int64 // requests
	reason   reason
	expiry   *time.Timer // while it is idle
	kept     *keptDir    // what is in root between actions

	stdin, stdout *os.File
	responses     *responses
	stderr        tail
	stderrRead    chan struct{} // closed when the end of stderr was reached
	cancel        context.CancelFunc
	ended         chan struct{} // closed when nothing of it runs any more
	result        runner.Result // set before ended is closed
	err           error         // as result
}

// start makes the root of a process and starts it. With an error, stop and remove
// follow.
func (p *process) start(ctx context.Context, req *Request, in *inputs) error {
	p.root, p.next = filepath.Join(p.dir, "root"), filepath.Join(p.dir, "next")
	// The pool is closed to others already.
	if err := os.Mkdir(p.dir, 0o711); err != nil { //nolint:gosec // as said
		return err
	}
	wd := command.WorkingDirectory(req.Command)
	build := inputroot.Request{Dir: p.root, Digest: in.tool, Owner: p.owner}
	if wd != "" {
		build.Directories = []string{wd}
	}
	if err := req.Inputs.build(ctx, build); err != nil {
		return err
	}
	var err error
	if p.kept, err = scan(p.root); err != nil {
		return err
	}
	streams, err := p.pipes()
	if err != nil {
		return err
	}
	r, err := req.Start(streams)
	for _, f := range []*os.File{streams.Stdin, streams.Stdout, streams.Stderr} {
		_ = f.Close() // the runner has its own
	}
	if err != nil {
		return fmt.Errorf("start a runner: %w", err)
	}
	p.responses = newResponses(p.stdout, req.Tool.Protocol, p.maxResponse)
	p.run(ctx, r, runner.Spec{
		Args: req.Tool.Startup, Env: environment(req.Command), Root: p.root, Dir: filepath.Join(p.root, wd),
	})
	return nil
}

// pipes makes the pipes. The ends that are returned are the process's.
func (p *process) pipes() (*runner.Streams, error) {
	var files [6]*os.File
	for i := 0; i < len(files); i += 2 {
		var err error
		if files[i], files[i+1], err = os.Pipe(); err != nil {
			for _, f := range files[:i] {
				_ = f.Close()
			}
			return nil, err
		}
	}
	p.stdin, p.stdout = files[1], files[2]
	p.stderrRead = make(chan struct{})
	stderr := files[4]
	go func() {
		defer close(p.stderrRead)
		_, _ = io.Copy(&p.stderr, stderr)
		_ = stderr.Close()
	}()
	return &runner.Streams{Stdin: files[0], Stdout: files[3], Stderr: files[5]}, nil
}

// run runs the process, until stop.
func (p *process) run(ctx context.Context, r runner.Runner, spec runner.Spec) {
	ctx, p.cancel = context.WithCancel(context.WithoutCancel(ctx))
	p.ended = make(chan struct{})
	go func() {
		defer close(p.ended)
		p.result, p.err = r.Run(ctx, spec)
		p.err = errors.Join(p.err, r.Close())
	}()
}

// stop ends the process, with all that it has started, and waits for that. It may be
// called again.
func (p *process) stop() {
	if p.ended != nil {
		p.cancel()
		<-p.ended
	}
	if p.stdin != nil {
		_ = p.stdin.Close()
		_ = p.stdout.Close()
		<-p.stderrRead // nobody has the other end any more
	}
}

// remove removes all files of a process that has ended.
func (p *process) remove() error { return inputroot.Remove(p.dir) }

// quiet reports, by an error, that an idle process has ended, spoken unasked, or made
// files.
func (p *process) quiet() error {
	select {
	case <-p.ended:
		return fmt.Errorf("%w: it ended while it had nothing to do", errProcess)
	default:
	}
	if err := p.responses.quiet(); err != nil {
		return err
	}
	return p.untouched()
}

// ask sends the request and waits for the response. When ctx is done before that, it
// returns at once.
func (p *process) ask(ctx context.Context, req *Request, in *inputs) (*persistentpb.WorkResponse, error) {
	args, err := expand(p.root, command.WorkingDirectory(req.Command), req.Tool.FlagFiles)
	if err != nil {
		return nil, err
	}
	data, err := encode(req.Tool.Protocol, &persistentpb.WorkRequest{Arguments: args, Inputs: in.files})
	if err != nil {
		return nil, fmt.Errorf("the request can't be sent: %w", err)
	}
	p.stderr.reset()
	// What is past is before any deadline.
	interrupt := func() {
		_ = p.stdin.SetWriteDeadline(time.Unix(1, 0))
		_ = p.stdout.SetReadDeadline(time.Unix(1, 0))
	}
	stopped := context.AfterFunc(ctx, interrupt)
	var sending sync.WaitGroup
	var sendErr error
	sending.Go(func() { _, sendErr = p.stdin.Write(data) })
	resp, err := p.responses.read()
	if err != nil {
		interrupt()
	} else {
		_ = p.stdin.SetWriteDeadline(time.Now().Add(time.Second)) // it has read all, or never will
	}
	sending.Wait()
	if !stopped() { // the deadlines are set for good
		return nil, fmt.Errorf("%w: %w: %w", errProcess, context.Cause(ctx), cmp.Or(err, errSilent))
	}
	if err == nil && sendErr != nil {
		err = fmt.Errorf("it answered before it had read the request: %w", sendErr)
	}
	if err != nil {
		p.awaitEnd(err)
		return nil, fmt.Errorf("%w: %w", errProcess, err)
	}
	return resp, p.stdin.SetWriteDeadline(time.Time{})
}

// endWait is more than it takes to hear of the end of a process.
const endWait = 500 * time.Millisecond

// awaitEnd waits a moment for the end of a process that has closed its stdout: so it
// is known how it came to that.
func (p *process) awaitEnd(err error) {
	if !errors.Is(err, errEnded) {
		return
	}
	late := time.NewTimer(endWait)
	defer late.Stop()
	select {
	case <-p.ended:
	case <-late.C:
	}
}

// explain says more of an error, when the process has ended.
func (p *process) explain(err error) error {
	var more strings.Builder
	select {
	case <-p.ended:
		if p.err != nil && !errors.Is(p.err, context.Canceled) {
			fmt.Fprintf(&more, "; %v", p.err)
		} else if p.err == nil {
			fmt.Fprintf(&more, "; it ended with exit code %d", p.result.ExitCode)
		}
	default:
	}
	if p.responses != nil {
		if first := p.responses.seen(); len(first) > 0 {
			fmt.Fprintf(&more, "; its stdout, of which every byte should be a response, began with %q", first)
		}
	}
	if last := p.stderr.String(); last != "" {
		fmt.Fprintf(&more, "; its stderr ended with %q", last)
	}
	return fmt.Errorf("%w%s", err, &more)
}

// tail keeps the end of what is written to it. It is safe for concurrent use.
type tail struct {
	mu   sync.Mutex // guards the rest
	last []byte
	n    int64 // bytes since reset
}

const (
	maxTail = 1 << 10
	// maxStderrBytes is what a process may write to its stderr at one request. Then
	// nobody reads it any more.
	maxStderrBytes = 128 << 20
)

var errStderr = errors.New("too much on stderr")

// reset begins another request.
func (t *tail) reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.n = 0
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.n += int64(len(b)); t.n > maxStderrBytes {
		return 0, errStderr
	}
	t.last = append(t.last, b[max(0, len(b)-maxTail):]...)
	t.last = t.last[:copy(t.last, t.last[max(0, len(t.last)-maxTail):])]
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.last)
}

// readNow reads what is there already.
func readNow(f *os.File, b []byte) (n int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	readErr := raw.Read(func(fd uintptr) bool {
		for {
			if n, err = unix.Read(int(fd), b); !errors.Is(err, unix.EINTR) {
				return true
			}
		}
	})
	return max(n, 0), errors.Join(err, readErr)
}
