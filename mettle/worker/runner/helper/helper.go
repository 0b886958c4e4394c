//go:build linux

package helper

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/cgroup"
	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// Is reports whether this process is a helper of that name. If so, all that it
// does is Main. It also reports whether it is the command of a Probe.
func Is(name string) bool {
	return len(os.Args) == helperArgs && os.Args[0] == name || isProbe()
}

// helperArgs is the number of a helper's arguments: its name, user, group, time
// to kill, and whether its command has streams of its own. Config and Bounds are not
// among them: a command must not read them in /proc.
const helperArgs = 5

// The last of them.
const (
	noStreams  = "files"
	ownStreams = "streams"
)

// Where a helper finds the streams.
const (
	streamStdin = iota + 4 // after its socket
	streamStdout
	streamStderr
	afterStreams
)

// What Probe runs.
const (
	selfExe   = "/proc/self/exe"
	probeName = "mettle-probe"
)

func isProbe() bool {
	return len(os.Args) == 3 && os.Args[0] == selfExe && os.Args[1] == probeName
}

// A Setting is where commands run, as the helper makes it. It is used by the
// helper's one goroutine, which is locked to its thread.
type Setting interface {
	// Enter is called once, before anything else, with Options.Config.
	Enter(config string, user User) error
	// Prepare readies the place for one command: it may change Root and Dir to
	// what the command is to see. Whatever was run before has ended.
	Prepare(spec *runner.Spec) error
	// OpenDir opens a directory of the host's file system, by its absolute
	// path, with O_PATH.
	OpenDir(path string) (fd int, err error)
	// KillAll kills, once, all processes that commands can have left, and
	// reports whether it can do that.
	KillAll() bool
}

// Main is the main of a process for which Is is true. It returns its exit code.
func Main(s Setting) int {
	if isProbe() {
		return probeMain(os.Args[2])
	}
	// Pdeathsig tells a child of the death of the thread that made it, and a
	// thread dies with the goroutine that is locked to it (golang/go#27505). It is not
	// the first one: see cgroup.
	runtime.LockOSThread()
	if unix.Gettid() != os.Getpid() {
		return serve(s)
	}
	code := make(chan int)
	go func() {
		runtime.LockOSThread()
		code <- serve(s)
	}()
	return <-code
}

// serve is Main on a thread of its own.
func serve(s Setting) int {
	// Those who stop a service by a signal to all its processes mean the worker,
	// which drains. Caught signals are the default ones again in a command;
	// ignored ones would stay ignored.
	signal.Notify(make(chan os.Signal, 1), unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	h := &helper{conn: 3, setting: s}
	if err := h.setUp(os.Args[1:]); err != nil {
		h.hello = reply{outcome: outcomeFailed, message: err.Error()}
	}
	if err := h.serve(); err != nil && !errors.Is(err, io.EOF) {
		fmt.Fprintf(os.Stderr, "%s %d: %v\n", os.Args[0], os.Getpid(), err)
		return 1
	}
	return 0
}

// helper is the helper's side. It is one goroutine and never waits for anything
// but its socket and its children.
type helper struct {
	conn        int // the socket
	setting     Setting
	starter     *starter // nil: commands begin on the thread of everything else
	hello       reply
	killTimeout time.Duration
	uid         int  // as which commands run; -1: that of the helper
	streams     bool // the one command has its own
	stdin       int  // of commands
	cred        *syscall.Credential
	stdout      output
	stderr      output
	in, out     []byte
	child       child
	limits      runner.Limits
	group       *cgroup.Inside
	quota       quota
	begun       posture
	threads     [2]int // of begun
	watched     bool   // begun is to be kept
}

func (h *helper) setUp(args []string) error {
	gid, err := 0, error(nil)
	if h.uid, err = strconv.Atoi(args[0]); err != nil {
		return fmt.Errorf("user: %w", err)
	}
	if gid, err = strconv.Atoi(args[1]); err != nil {
		return fmt.Errorf("group: %w", err)
	}
	if h.uid >= 0 {
		h.cred = &syscall.Credential{Uid: uint32(h.uid), Gid: uint32(gid)}
	}
	if h.killTimeout, err = time.ParseDuration(args[2]); err != nil {
		return fmt.Errorf("kill timeout: %w", err)
	}
	// The socket, and what the worker was given by whoever started it.
	if err := unix.CloseRange(uint(h.conn), math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		unix.CloseOnExec(h.conn) // a kernel before 5.11
	}
	next := h.conn + 1
	if args[3] == ownStreams {
		h.streams, h.stdin, next = true, streamStdin, afterStreams
	}
	var config, bounds string
	if config, err = h.readText(); err == nil {
		bounds, err = h.readText()
	}
	if err != nil {
		return err
	}
	if err := h.bound(bounds, next); err != nil {
		return err
	}
	if err := h.setting.Enter(config, User{Set: h.uid >= 0, UID: h.uid, GID: gid}); err != nil {
		return err
	}
	if !h.streams {
		if h.stdin, err = unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return fmt.Errorf("open %s: %w", os.DevNull, err)
		}
	}
	// A command of the same user could read or change it by /proc: have it chosen
	// when memory is short, say.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("close /proc to others: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become a child subreaper: %w", err)
	}
	if err := ignoreChildren(); err != nil {
		return fmt.Errorf("ignore SIGCHLD: %w", err)
	}
	if err := ignoreAttacks(); err != nil {
		return fmt.Errorf("ignore signals: %w", err)
	}
	unix.Umask(0o022)
	// A core file would be written into the action's directory, or handed to a
	// collector of the host, for each test that crashes.
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core files: %w", err)
	}
	if c, ok := h.setting.(Confiner); ok {
		h.starter, err = newStarter(h, c)
	} else {
		err = h.group.Join()
	}
	if err == nil {
		h.watchPosture()
	}
	return err
}

// serve runs commands until the worker closes its end, and then returns io.EOF.
// Whatever runs then is killed.
func (h *helper) serve() error {
	if err := h.send(h.hello); err != nil || h.hello.outcome != outcomeDone {
		return err
	}
	for {
		q, err := h.receive()
		if err != nil {
			return err
		}
		if q.kind != frameRun {
			continue // a kill of a command that has just ended
		}
		rep, err := h.run(q)
		if err != nil {
			return err
		}
		if err := h.send(rep); err != nil {
			return err
		}
	}
}

func (h *helper) send(p reply) error {
	p.message = p.message[:min(len(p.message), maxMessage)]
	h.out = p.append(h.out[:0])
	for b := h.out; len(b) > 0; {
		n, err := unix.SendmsgN(h.conn, b, nil, nil, unix.MSG_NOSIGNAL)
		if errors.Is(err, unix.EPIPE) {
			return io.EOF
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("reply: %w", err)
		}
		b = b[max(n, 0):]
	}
	return nil
}

// receive reads one frame, and io.EOF when the worker is gone.
func (h *helper) receive() (request, error) {
	if h.in == nil {
		h.in = make([]byte, 0, 64<<10)
	}
	for {
		if q, ok, err := h.next(); ok || err != nil {
			return q, err
		}
		// The next command mostly comes soon.
		if _, err := pollUnseen([]unix.PollFd{{Fd: int32(h.conn), Events: unix.POLLIN}}, brief); err != nil && !errors.Is(err, unix.EINTR) {
			return request{}, fmt.Errorf("poll: %w", err)
		}
		n, err := unix.Read(h.conn, h.in[len(h.in):cap(h.in)])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil && !errors.Is(err, unix.ECONNRESET):
			return request{}, fmt.Errorf("read a request: %w", err)
		case n <= 0:
			return request{}, io.EOF
		default:
			h.in = h.in[:len(h.in)+n]
		}
	}
}

// next takes a frame from what was read already, if all of it was, and otherwise
// makes room for it.
func (h *helper) next() (q request, ok bool, err error) {
	if len(h.in) < frameHeader {
		return request{}, false, nil
	}
	n := int(binary.LittleEndian.Uint32(h.in))
	if n > maxFrame {
		return request{}, false, fmt.Errorf("%w: of %d bytes", errFrame, n)
	}
	end := frameHeader + n
	if len(h.in) < end {
		if end > cap(h.in) {
			h.in = append(make([]byte, 0, end), h.in...)
		}
		return request{}, false, nil
	}
	q, err = parseRequest(h.in[frameHeader:end])
	h.in = h.in[:copy(h.in, h.in[end:])]
	return q, err == nil, err
}

// readText reads what the worker sends first: Config, and Bounds.
func (h *helper) readText() (string, error) {
	var size [4]byte
	if err := h.readFull(size[:]); err != nil {
		return "", err
	}
	n := binary.LittleEndian.Uint32(size[:])
	if n > maxText {
		return "", fmt.Errorf("%w: %d bytes of configuration", errFrame, n)
	}
	config := make([]byte, n)
	err := h.readFull(config)
	return string(config), err
}

func (h *helper) readFull(b []byte) error {
	for len(b) > 0 {
		n, err := unix.Read(h.conn, b)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("read the configuration: %w", err)
		case n == 0:
			return io.EOF
		}
		b = b[n:]
	}
	return nil
}
