//go:build linux

package helper

import (
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/cgroup"
	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// Bounds are what a Runner holds each command to. Where it runs into one that ends it,
// its exit code is 137, and the reason is the last line of its stderr.
type Bounds struct {
	// Limits are those of each command. Memory, CPU time and, unless CountUser,
	// processes are bounded by Group alone.
	Limits runner.Limits
	// Group, if set, bounds commands and measures what they use. The Runner closes
	// it.
	Group *cgroup.Group
	// CountUser bounds processes by those of the commands' user (RLIMIT_NPROC), where
	// Group does not: it takes a user who has no other processes.
	CountUser bool
}

// inherited is Bounds as the helper gets them.
type inherited struct {
	Limits    runner.Limits
	CountUser bool
	Group     string
}

// argument is what the helper is told, and the files that it is given with it.
func (b *Bounds) argument() (string, []*os.File, error) {
	text, files := b.Group.Handover()
	data, err := json.Marshal(inherited{Limits: b.Limits, CountUser: b.CountUser, Group: text})
	return string(data), files, err
}

// ownThreads is room for the helper's own threads, where they count too.
const ownThreads = 32

// fileSlack lets a file become longer than the quota by so much that it is over it
// without doubt, also where the program does not end by SIGXFSZ.
const fileSlack = 4096

// bound makes the helper hold commands to what arg says. The group's files begin at
// descriptor first.
func (h *helper) bound(arg string, first int) (err error) {
	var b inherited
	if err := json.Unmarshal([]byte(arg), &b); err != nil {
		return fmt.Errorf("bounds: %w", err)
	}
	h.limits = b.Limits
	if h.group, err = cgroup.Take(b.Group, first); err != nil {
		return err
	}
	if b.CountUser && b.Limits.Processes > 0 {
		n := uint64(b.Limits.Processes)
		if h.cred == nil {
			n += ownThreads
		}
		if err := lower(unix.RLIMIT_NPROC, n); err != nil {
			return fmt.Errorf("bound processes: %w", err)
		}
	}
	if n := b.Limits.DiskBytes; n > 0 {
		// Caught, it is no end of the helper, and the default in commands.
		signal.Notify(make(chan os.Signal, 1), unix.SIGXFSZ)
		size := uint64(n) + fileSlack
		if err := lower(unix.RLIMIT_FSIZE, size); err != nil {
			return fmt.Errorf("bound the length of files: %w", err)
		}
		h.quota = quota{limit: n, uid: h.uid}
		if _, ok := h.setting.(Confiner); ok || h.uid >= 0 {
			h.quota.proc = h.seen("/proc")
		}
	}
	return nil
}

// lower bounds this process and its children to n of a resource, or to what the
// worker was started with where that is less: container engines and login shells
// set bounds that only the machine's root may raise.
func lower(resource int, n uint64) error {
	var now unix.Rlimit
	if err := unix.Getrlimit(resource, &now); err != nil {
		return err
	}
	n = min(n, now.Max)
	return unix.Setrlimit(resource, &unix.Rlimit{Cur: n, Max: n})
}

// ending is which limit ended a command.
type ending int64

const (
	endedByItself ending = iota
	endedByMemory
	endedByMachine // it had not as much as it may have
	endedByDisk
)

// exitKilled is the exit code of what was ended by a limit: 128 and SIGKILL.
const exitKilled = 137

// settle adds to rep what the bounds have to say of a command that has ended with all
// its processes.
func (h *helper) settle(rep *reply) {
	used, res := h.group.End(), &rep.result
	u := &res.Usage
	u.PeakMemoryBytes = used.PeakMemoryBytes
	u.UserTime, u.SystemTime = max(u.UserTime, used.User), max(u.SystemTime, used.System)
	if rep.ended == endedByItself && !rep.killed && h.quota.limit > 0 && h.quota.last(&h.child, h.wanted) {
		rep.ended = endedByDisk
	}
	switch {
	case rep.ended == endedByDisk:
		rep.note("disk quota: this action wrote more than the %s that it may", bytesText(h.limits.DiskBytes))
	case used.Killed > 0 && used.OwnLimit:
		rep.ended = endedByMemory
		rep.note("out of memory: this action may use %s, and %s", bytesText(h.limits.MemoryBytes), killedText(used.Killed))
	case used.Killed > 0:
		rep.ended = endedByMachine
		rep.note("the worker's machine ran out of memory, and %s", killedText(used.Killed))
	}
	if rep.ended != endedByItself {
		h.tell(rep.message)
		if res.ExitCode == 0 && !rep.killed {
			rep.note("the command itself ended with 0 all the same: what it made is not to be relied on")
		}
		res.ExitCode = exitKilled
	}
	if used.Refused > 0 && res.ExitCode != 0 {
		rep.note("%d times no process could be started: this action may have %d processes and threads at once", used.Refused, h.limits.Processes)
	}
}

// note adds a line for a person.
func (p *reply) note(format string, args ...any) {
	if p.message != "" {
		p.message += "\n"
	}
	p.message += fmt.Sprintf(format, args...)
}

func killedText(n int64) string {
	if n == 1 {
		return "a process of it was killed"
	}
	return fmt.Sprintf("%d processes of it were killed", n)
}

func bytesText(n int64) string {
	const mib = 1 << 20
	if n%mib == 0 {
		return fmt.Sprintf("%d MiB", n/mib)
	}
	return fmt.Sprintf("%d bytes", n)
}

// tell tells the user why a command has ended, in its stderr, on a line of its own.
func (h *helper) tell(reason string) {
	if h.streams {
		return // they are the command's
	}
	var st unix.Stat_t
	start := ""
	if err := unix.Fstat(h.stderr.fd, &st); err == nil && st.Size > 0 {
		start = "\n"
	}
	_, _ = unix.Write(h.stderr.fd, []byte(start+"mettle: "+reason+"\n"))
}

// sampleEvery is how often the memory of a command is looked at where the kernel does
// not keep its peak.
const sampleEvery = 250 * time.Millisecond

// pause is how long to wait for the command's end, or word from the worker, before
// something is to be looked at, but not for longer than so.
func (h *helper) pause(so time.Duration) time.Duration {
	if h.group.Sampled() {
		h.group.Sample()
		so = min(so, sampleEvery)
	}
	return h.quota.timeout(so)
}

// wanted reports whether the worker has something to say, or the command has ended:
// a look at the disk is to end then.
func (h *helper) wanted() bool {
	fds := []unix.PollFd{{Fd: int32(h.conn), Events: unix.POLLIN}, {Fd: int32(h.child.pidfd), Events: unix.POLLIN}}
	if h.child.pidfd < 0 || h.child.ended {
		fds = fds[:1]
	}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0
}
