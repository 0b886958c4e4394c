//go:build linux

package helper

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// child is the command that runs, the first of its processes.
type child struct {
	pid    int
	pidfd  int // -1 where the kernel has none
	ended  bool
	status syscall.WaitStatus
	usage  syscall.Rusage
	end    time.Time
}

// reapEvery is how often zombies are reaped while a command runs that leaves
// some: so few that nobody comes near the limit of processes for them.
const reapEvery = time.Second

// pollEvery is how often a child is looked at where the kernel has no pidfd
// (before Linux 5.4).
const pollEvery = 5 * time.Millisecond

// run runs one command to its end, and everything else that it started. The
// error means that the helper must end: the worker is gone, or trouble.
func (h *helper) run(q request) (reply, error) {
	rep := reply{seq: q.seq, outcome: outcomeDone}
	if err := h.openOutputs(&q.spec); err != nil {
		rep.outcome, rep.message = outcomeFailed, err.Error()
		return rep, nil
	}
	if err := h.setting.Prepare(&q.spec); err != nil {
		rep.outcome, rep.message = outcomeFailed, err.Error()
		return rep, nil
	}
	h.group.Begin()
	h.quota.begin(h.seen(q.spec.Root))
	rep.result.Start = time.Now()
	code, err := h.start(&q.spec)
	if err != nil && code != 0 {
		h.explain(&q.spec, err)
	}
	h.leaveStreams()
	if err != nil {
		if code == 0 {
			rep.outcome, rep.message = outcomeFailed, err.Error()
			return rep, nil
		}
		rep.result.ExitCode, rep.result.End = code, time.Now()
	} else {
		if err := h.wait(&rep); err != nil {
			return reply{}, err
		}
		c := &h.child
		rep.result.ExitCode, rep.result.End, rep.result.Usage = exitCode(c.status), c.end, usageOf(&c.usage)
		h.settle(&rep)
	}
	rep.result.StdoutBytes = h.stdout.finish()
	rep.result.StderrBytes = h.stderr.finish()
	rep.disturbed = h.isDisturbed()
	return rep, nil
}

// seen is where this thread finds what commands find at path.
func (h *helper) seen(path string) string {
	if c, ok := h.setting.(Confiner); ok {
		return c.Seen(path)
	}
	return path
}

// explain tells the user, in the command's stderr, why it did not start.
func (h *helper) explain(spec *runner.Spec, err error) {
	_, _ = unix.Write(h.stderr.fd, fmt.Appendf(nil, "mettle: %.200s: %v\n", spec.Args[0], err))
}

// start starts the command, which is h.child then. An error with a code is the
// command's fault, and the code is what a shell would return; without one it is
// ours.
func (h *helper) start(spec *runner.Spec) (code int, err error) {
	if h.starter != nil {
		h.child, code, err = h.starter.start(spec)
	} else {
		h.child, code, err = h.launch(spec)
	}
	return code, err
}

// maxBusy is how often a program is tried again that somebody writes to: for two
// seconds, since a process that is just starting on a busy machine may take some.
const maxBusy = 35

// launch is start on the thread that commands begin on.
func (h *helper) launch(spec *runner.Spec) (c child, code int, err error) {
	attr := &syscall.ProcAttr{
		Dir:   spec.Dir,
		Env:   spec.Env,
		Files: []uintptr{uintptr(h.stdin), uintptr(h.stdout.fd), uintptr(h.stderr.fd)},
		Sys: &syscall.SysProcAttr{
			Setsid:     true,
			Credential: h.cred,
			Pdeathsig:  syscall.SIGKILL,
			PidFD:      new(int),
		},
	}
	if fd, ok := h.group.Into(); ok {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, fd
	}
	candidates, code, err := programs(spec)
	if err != nil {
		return child{}, code, err
	}
	for _, path := range candidates {
		for busy := 0; ; busy++ {
			*attr.Sys.PidFD = -1
			pid, err := syscall.ForkExec(path, spec.Args, attr)
			if err == nil {
				return child{pid: pid, pidfd: *attr.Sys.PidFD}, 0, nil
			}
			if errors.Is(err, unix.ETXTBSY) && busy < maxBusy {
				// Somebody else on this machine writes to the program; or is about to
				// become another program, and has it open from the one that wrote it.
				time.Sleep(time.Millisecond << min(busy, 6))
				continue
			}
			code, err = classify(spec, path, err)
			if code != codeNotExecutable || !errors.Is(err, unix.EACCES) {
				return child{}, code, err
			}
			break // as execvp does, look further in the PATH
		}
	}
	return child{}, codeNotExecutable, fmt.Errorf("cannot execute: %w", unix.EACCES)
}

// wait waits for the child, and then for all that it left behind, after killing
// it.
func (h *helper) wait(rep *reply) error {
	c := &h.child
	defer func() {
		if c.pidfd >= 0 {
			unix.Close(c.pidfd) //nolint:errcheck // it only told of an end
		}
	}()
	fds := []unix.PollFd{{Fd: int32(h.conn), Events: unix.POLLIN}, {Fd: int32(c.pidfd), Events: unix.POLLIN}}
	timeout := reapEvery
	if c.pidfd < 0 {
		fds, timeout = fds[:1], pollEvery
	}
	left := true
	for !c.ended {
		fds[0].Revents = 0
		// What has been read already, poll does not tell of: the word to kill
		// may have come together with the command.
		q, heard, err := h.next()
		if err == nil && !heard {
			if err := poll(fds, h.pause(timeout)); err != nil {
				return fmt.Errorf("poll: %w", err)
			}
			if heard = fds[0].Revents != 0; heard {
				q, err = h.receive()
			}
		}
		if err != nil {
			h.killAll()
			return err
		}
		if heard && q.kind == frameKill && q.seq == rep.seq {
			rep.killed = true
			left = h.killAll()
			break
		}
		if !heard {
			left = h.reap()
		}
		if !c.ended && h.quota.look(h.wanted) {
			rep.ended = endedByDisk
			left = h.killAll()
			break
		}
	}
	if left && c.ended {
		left = h.killAll()
	}
	if left {
		rep.outcome = outcomeLeftovers
	}
	if !c.ended {
		c.end = time.Now() // it hangs in the kernel
	}
	return nil
}

// reap takes the children that have ended, and reports whether there are others.
func (h *helper) reap() (left bool) {
	for {
		var status syscall.WaitStatus
		var usage syscall.Rusage
		pid, err := syscall.Wait4(-1, &status, unix.WNOHANG|unix.WALL, &usage)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil: // ECHILD
			return false
		case pid == 0:
			return true
		case pid == h.child.pid && !h.child.ended:
			h.child.ended, h.child.end = true, time.Now()
			h.child.status, h.child.usage = status, usage
		}
	}
}

func exitCode(status syscall.WaitStatus) int {
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}

func usageOf(u *syscall.Rusage) runner.Usage {
	return runner.Usage{
		UserTime:          time.Duration(u.Utime.Nano()),
		SystemTime:        time.Duration(u.Stime.Nano()),
		MaxRSSBytes:       u.Maxrss << 10,
		MinorFaults:       u.Minflt,
		MajorFaults:       u.Majflt,
		BlockInputs:       u.Inblock,
		BlockOutputs:      u.Oublock,
		VoluntarySwitches: u.Nvcsw,
		ForcedSwitches:    u.Nivcsw,
	}
}

// output is the file that stdout or stderr goes to.
type output struct {
	fd    int
	path  string
	flags int  // as it was opened
	clean bool // open, empty and in its place: the next command may have it
}

func (h *helper) openOutputs(spec *runner.Spec) error {
	if h.streams {
		h.stdout, h.stderr = output{fd: streamStdout}, output{fd: streamStderr}
		return nil
	}
	if err := h.stdout.open(h.setting, spec.Stdout, h.cred); err != nil {
		return err
	}
	return h.stderr.open(h.setting, spec.Stderr, h.cred)
}

// leaveStreams leaves the command's streams to it: the other side notices then when
// it has closed them.
func (h *helper) leaveStreams() {
	if !h.streams {
		return
	}
	for fd := streamStdin; fd <= streamStderr; fd++ {
		unix.Close(fd) //nolint:errcheck // nothing of ours was written
	}
}

// open makes o an empty file at path that has this one name, and keeps the one
// from the last command if that wrote nothing, as most do. It belongs to the
// command's user, or /dev/stdout could not be opened: that opens the file anew.
func (o *output) open(at Setting, path string, owner *syscall.Credential) error {
	if o.clean && o.path == path {
		return nil
	}
	o.close()
	dir, err := at.OpenDir(filepath.Dir(path))
	if err != nil {
		return &os.PathError{Op: "open", Path: filepath.Dir(path), Err: err}
	}
	defer unix.Close(dir) //nolint:errcheck // only a place
	name := filepath.Base(path)
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_APPEND | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(dir, name, flags, 0o600)
	if errors.Is(err, unix.EEXIST) {
		// It may be a blob by now: it must not be truncated.
		if err := unix.Unlinkat(dir, name, 0); err != nil {
			return &os.PathError{Op: "remove", Path: path, Err: err}
		}
		fd, err = unix.Openat(dir, name, flags, 0o600)
	}
	if err != nil {
		return &os.PathError{Op: "create", Path: path, Err: err}
	}
	o.fd, o.path = fd, path
	if o.flags, err = unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil {
		o.close()
		return &os.PathError{Op: "look at", Path: path, Err: err}
	}
	if owner != nil {
		if err := unix.Fchown(fd, int(owner.Uid), int(owner.Gid)); err != nil {
			o.close()
			return &os.PathError{Op: "chown", Path: path, Err: err}
		}
	}
	return nil
}

// finish returns the size, and closes the file unless it can be used again.
func (o *output) finish() int64 {
	if o.path == "" {
		return 0 // a stream
	}
	var st unix.Stat_t
	if err := unix.Fstat(o.fd, &st); err != nil {
		st = unix.Stat_t{}
	}
	o.clean = st.Size == 0 && st.Nlink == 1 && st.Mode == unix.S_IFREG|0o600 && o.isAsOpened()
	if !o.clean {
		o.close()
	}
	return st.Size
}

// isAsOpened reports whether the descriptor, which commands share with the helper, is as
// it was: without O_APPEND, say, the next command would write at an offset.
func (o *output) isAsOpened() bool {
	flags, err := unix.FcntlInt(uintptr(o.fd), unix.F_GETFL, 0)
	if err != nil || flags != o.flags {
		return false
	}
	if at, err := unix.Seek(o.fd, 0, unix.SEEK_CUR); err != nil || at != 0 {
		return false
	}
	lease, err := unix.FcntlInt(uintptr(o.fd), unix.F_GETLEASE, 0)
	return (err != nil || lease == unix.F_UNLCK) && unix.Flock(o.fd, unix.LOCK_UN) == nil
}

func (o *output) close() {
	if o.path != "" {
		unix.Close(o.fd) //nolint:errcheck // nothing of ours was written
	}
	*o = output{}
}
