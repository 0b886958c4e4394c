//go:build linux

package helper

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// helperProcess is the worker's side of a helper.
type helperProcess struct {
	process *os.Process
	conn    *os.File // the worker's end of the socket pair, in the poller
	in      []byte   // bytes of a reply that were read so far
}

func startHelper(opts Options) (*helperProcess, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket pair: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "helper end")
	defer theirs.Close() //nolint:errcheck // the helper has its own
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0]) //nolint:errcheck // nothing was sent
		return nil, fmt.Errorf("set the socket non-blocking: %w", err)
	}
	conn := os.NewFile(uintptr(fds[0]), "worker end")
	uid, gid := -1, -1
	if opts.User.Set {
		uid, gid = opts.User.UID, opts.User.GID
	}
	attr := &syscall.SysProcAttr{}
	if opts.Attr != nil {
		*attr = *opts.Attr
	}
	attr.Setsid = true
	bounds, boundsFiles, err := opts.Bounds.argument()
	if err != nil {
		conn.Close() //nolint:errcheck // nothing was sent
		return nil, err
	}
	files, streams := []*os.File{nil, nil, os.Stderr, theirs}, noStreams
	if s := opts.Streams; s != nil {
		files, streams = append(files, s.Stdin, s.Stdout, s.Stderr), ownStreams
	}
	process, err := os.StartProcess(selfExe, []string{
		opts.Name, strconv.Itoa(uid), strconv.Itoa(gid), opts.KillTimeout.String(), streams,
	}, &os.ProcAttr{
		Dir:   "/",
		Env:   helperEnv(),
		Files: append(files, boundsFiles...),
		Sys:   attr,
	})
	if err != nil {
		conn.Close() //nolint:errcheck // nothing was sent
		return nil, err
	}
	h := &helperProcess{process: process, conn: conn}
	if err := h.hello(opts.Config, bounds); err != nil {
		return nil, errors.Join(err, h.close(0))
	}
	return h, nil
}

// helperEnv is the environment of a helper, of which commands see nothing. It
// allocates a few kilobytes a command, in one goroutine.
func helperEnv() []string {
	env := []string{"GOMAXPROCS=1"}
	for _, name := range []string{"GODEBUG", "GORACE", "GOTRACEBACK"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// startTimeout bounds the start of a helper, which takes milliseconds, on a
// machine that is swapping.
const startTimeout = 30 * time.Second

// hello tells the helper its Config and its Bounds, and waits until the helper says that it is ready.
func (h *helperProcess) hello(config, bounds string) error {
	if err := h.conn.SetDeadline(time.Now().Add(startTimeout)); err != nil {
		return err
	}
	if _, err := h.conn.Write(appendString(appendString(nil, config), bounds)); err != nil && !errors.Is(err, unix.EPIPE) {
		return fmt.Errorf("configure it: %w", err)
	}
	if err := h.conn.SetWriteDeadline(time.Time{}); err != nil {
		return err
	}
	rep, err := h.readReply()
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, unix.ECONNRESET):
		return errors.New("it ended at once: does main begin with IsHelper?")
	case err != nil:
		return err
	case rep.outcome != outcomeDone:
		return errors.New(rep.message)
	}
	return nil
}

// kill has the command of the request seq killed. An error means that the
// helper is gone, which the reader of its reply notices.
func (h *helperProcess) kill(seq uint64) {
	_, _ = h.conn.Write(appendKill(nil, seq))
}

// readReply reads one reply. After a deadline it may be called again.
func (h *helperProcess) readReply() (reply, error) {
	if h.in == nil {
		h.in = make([]byte, 0, 4096)
	}
	for {
		if rep, n, ok, err := parseReply(h.in); err != nil {
			return reply{}, err
		} else if ok {
			h.in = h.in[:copy(h.in, h.in[n:])]
			return rep, nil
		}
		n, err := h.conn.Read(h.in[len(h.in):cap(h.in)])
		h.in = h.in[:len(h.in)+n]
		if err != nil {
			return reply{}, err
		}
	}
}

// close lets the helper kill what runs and end, and kills it when it has not
// done so in time.
func (h *helperProcess) close(timeout time.Duration) error {
	var late error
	if err := h.shutdown(); err == nil && timeout > 0 {
		_ = h.conn.SetReadDeadline(time.Now().Add(timeout))
		var b [512]byte
		for {
			_, err := h.conn.Read(b[:])
			if errors.Is(err, os.ErrDeadlineExceeded) {
				late = fmt.Errorf("helper %d had to be killed: it did not end within %v", h.process.Pid, timeout)
			}
			if err != nil {
				break
			}
		}
	}
	if late != nil || timeout == 0 {
		_ = h.process.Kill()
	}
	_, err := h.process.Wait()
	return errors.Join(late, err, h.conn.Close())
}

func (h *helperProcess) shutdown() error {
	raw, err := h.conn.SyscallConn()
	if err != nil {
		return err
	}
	var shutErr error
	if err := raw.Control(func(fd uintptr) { shutErr = unix.Shutdown(int(fd), unix.SHUT_WR) }); err != nil {
		return err
	}
	return shutErr
}
