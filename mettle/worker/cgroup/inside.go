//go:build linux

package cgroup

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// role is what a file of a group is for.
type role string

const (
	roleJoin        role = "join"          // a thread that writes 0 is in the group: version 1
	roleInto        role = "into"          // the directory, to clone into: version 2
	roleKill        role = "kill"          // 1 kills all
	roleUsage       role = "usage"         // memory now
	rolePeak        role = "peak"          // the most of it since something was written
	roleAllTimePeak role = "all-time peak" // the most of it since the group was made
	roleEvents      role = "events"        // lines oom_kill and, in version 2, oom
	roleForks       role = "forks"         // line max: forks that were refused
	roleCPU         role = "cpu"           // lines user_usec and system_usec: version 2
	roleUser        role = "user"          // nanoseconds: version 1
	roleSystem      role = "system"        // likewise
)

// Inside is the helper's side of a Group. It is used by one goroutine, that which
// starts commands, and makes no garbage. The zero Inside, by NoGroup, measures nothing.
type Inside struct {
	joins []int
	into  int
	files map[role]int
	// Of memory, as in handover, and the most that Sample saw.
	limit     int64
	uncounted bool
	sampled   int64
	buf       [1024]byte
	begun     state
}

// state is the counters of a group.
type state struct {
	usage, peak              int64
	oomKills, ooms           int64
	refused                  int64
	userMicros, systemMicros int64
	hasCPU, hasUsage         bool
}

// Used is what was used between Begin and End.
type Used struct {
	// PeakMemoryBytes is the most memory that was added to what the group had: where
	// the kernel does not tell, what Sample saw. 0: not known.
	PeakMemoryBytes int64
	// User and System are the CPU time of all processes. 0: not known.
	User, System time.Duration
	// Killed is how many processes the kernel killed for want of memory.
	Killed int64
	// OwnLimit says that the group's own limit was why, not that of a group above it
	// or the size of the machine.
	OwnLimit bool
	// Refused is how often no process could be started because of the limit.
	Refused int64
}

// Take takes what was handed over: text, and the files from descriptor first on.
func Take(text string, first int) (*Inside, error) {
	in := &Inside{into: -1, files: map[role]int{}}
	if text == "" {
		return in, nil
	}
	var handed handover
	if err := json.Unmarshal([]byte(text), &handed); err != nil {
		return nil, fmt.Errorf("control group: %w", err)
	}
	in.limit, in.uncounted = handed.MemoryBytes, handed.Uncounted
	for i, r := range handed.Roles {
		switch fd := first + i; r {
		case roleJoin:
			in.joins = append(in.joins, fd)
		case roleInto:
			in.into = fd
		default:
			in.files[r] = fd
		}
	}
	return in, nil
}

// Join puts the calling thread into the groups of version 1, for good: it is not to
// be the first of its process. It reports whether there are any.
func (in *Inside) Join() error {
	for _, fd := range in.joins {
		if _, err := unix.Write(fd, []byte("0")); err != nil {
			return fmt.Errorf("join a control group: %w", err)
		}
		unix.Close(fd) //nolint:errcheck // it is done
	}
	in.joins = nil
	return nil
}

// Into is the directory that commands are to be cloned into, if any.
func (in *Inside) Into() (fd int, ok bool) { return in.into, in.into >= 0 }

// Kill kills, at once, all that is in the group, and reports whether it can.
func (in *Inside) Kill() bool {
	fd, ok := in.files[roleKill]
	if !ok {
		return false
	}
	_, err := unix.Pwrite(fd, []byte("1"), 0)
	return err == nil
}

// Begin is called before a command starts, when no process is in the group.
func (in *Inside) Begin() {
	if fd, ok := in.files[rolePeak]; ok {
		_ = resets(fd) // it could when the group was made
	}
	in.begun, in.sampled = in.read(), 0
}

// Sampled reports whether Sample is to be called now and then: where the kernel can't
// tell how much memory one command had, in version 2 before Linux 6.12.
func (in *Inside) Sampled() bool {
	_, usage := in.files[roleUsage]
	_, peak := in.files[rolePeak]
	return usage && !peak
}

// Sample looks how much memory the command has.
func (in *Inside) Sample() {
	usage, _ := in.number(roleUsage)
	in.sampled = max(in.sampled, usage)
}

// End is called when all processes of the command have ended.
func (in *Inside) End() Used {
	a, b := in.begun, in.read()
	u := Used{
		Killed: max(0, b.oomKills-a.oomKills), Refused: max(0, b.refused-a.refused),
		OwnLimit: b.ooms > a.ooms || in.uncounted && in.limit > 0 && b.peak > in.limit-nearLimit(in.limit),
	}
	if a.hasUsage {
		peak := in.sampled
		// A peak of all times tells of this command only if it has risen.
		if !in.Sampled() || b.peak > a.peak {
			peak = b.peak
		}
		if in.Sampled() && u.Killed > 0 && u.OwnLimit {
			peak = max(peak, in.limit)
		}
		u.PeakMemoryBytes = max(0, peak-a.usage)
	}
	if a.hasCPU && b.hasCPU {
		u.User = max(0, time.Duration(b.userMicros-a.userMicros)*time.Microsecond)
		u.System = max(0, time.Duration(b.systemMicros-a.systemMicros)*time.Microsecond)
	}
	return u
}

// nearLimit is how far below its limit, in bytes, a group of version 1 can be when the
// kernel kills a process of it: it may have asked for a huge page.
func nearLimit(limit int64) int64 { return min(4<<20, limit/8) }

func (in *Inside) read() (s state) {
	s.usage, s.hasUsage = in.number(roleUsage)
	var ok bool
	if s.peak, ok = in.number(rolePeak); !ok {
		s.peak, _ = in.number(roleAllTimePeak)
	}
	if text := in.text(roleEvents); text != nil {
		s.oomKills, s.ooms = field(text, "oom_kill"), field(text, "oom")
	}
	s.refused = field(in.text(roleForks), "max")
	if text := in.text(roleCPU); text != nil {
		s.userMicros, s.systemMicros, s.hasCPU = field(text, "user_usec"), field(text, "system_usec"), true
	} else if user, ok := in.number(roleUser); ok {
		system, _ := in.number(roleSystem)
		s.userMicros, s.systemMicros, s.hasCPU = user/1000, system/1000, true
	}
	return s
}

// text is what is in a file, until the next call; nil where there is none.
func (in *Inside) text(r role) []byte {
	fd, ok := in.files[r]
	if !ok {
		return nil
	}
	n, err := unix.Pread(fd, in.buf[:], 0)
	if err != nil || n <= 0 {
		return nil
	}
	return in.buf[:n]
}

// number is that of a file with one.
func (in *Inside) number(r role) (int64, bool) {
	text := in.text(r)
	if text == nil {
		return 0, false
	}
	n, err := strconv.ParseInt(string(bytes.TrimSpace(text)), 10, 64)
	return n, err == nil
}

// field is the number in the line that begins with name; 0 where there is none.
func field(text []byte, name string) int64 {
	for line := range bytes.Lines(text) {
		if rest, ok := bytes.CutPrefix(line, []byte(name)); ok && len(rest) > 0 && rest[0] == ' ' {
			n, err := strconv.ParseInt(string(bytes.TrimSpace(rest)), 10, 64)
			if err != nil {
				return 0
			}
			return n
		}
	}
	return 0
}
