//go:build linux

package helper

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// The two ends of the socket pair are the same program, so the messages have no
// version. All numbers are little endian. A frame is the length of what
// follows (4 bytes), its kind (1), its sequence number (8), and for a command its
// strings, each with its length (4) before it: Root, Dir, Stdout, Stderr, the number
// of arguments (4) and they, the number of variables (4) and they.

type frameKind byte

const (
	frameRun frameKind = iota + 1
	frameKill
)

const (
	frameHeader = 4
	framePrefix = 1 + 8
	// maxFrame is over what execve takes (2 MiB at the usual stack limit).
	maxFrame = 64 << 20
)

var errFrame = errors.New("malformed message between worker and helper")

func appendString(b []byte, s string) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

func appendStrings(b []byte, ss []string) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(len(ss)))
	for _, s := range ss {
		b = appendString(b, s)
	}
	return b
}

func appendFrame(b []byte, kind frameKind, seq uint64) []byte {
	b = append(b, 0, 0, 0, 0, byte(kind))
	return binary.LittleEndian.AppendUint64(b, seq)
}

func appendRequest(b []byte, seq uint64, s *runner.Spec) []byte {
	start := len(b)
	b = appendFrame(b, frameRun, seq)
	b = appendString(b, s.Root)
	b = appendString(b, s.Dir)
	b = appendString(b, s.Stdout)
	b = appendString(b, s.Stderr)
	b = appendStrings(b, s.Args)
	b = appendStrings(b, s.Env)
	binary.LittleEndian.PutUint32(b[start:], uint32(len(b)-start-frameHeader))
	return b
}

func appendKill(b []byte, seq uint64) []byte {
	b = appendFrame(b, frameKill, seq)
	binary.LittleEndian.PutUint32(b, framePrefix)
	return b
}

// request is a frame as the helper reads it.
type request struct {
	kind frameKind
	seq  uint64
	spec runner.Spec
}

// reader takes numbers and strings off a frame; after the first that is not
// there, all are zero and bad is set.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) uint32() int {
	if len(r.b) < 4 {
		r.bad = true
		return 0
	}
	n := binary.LittleEndian.Uint32(r.b)
	r.b = r.b[4:]
	return int(n)
}

func (r *reader) string() string {
	n := r.uint32()
	if r.bad || n > len(r.b) {
		r.bad = true
		return ""
	}
	s := string(r.b[:n])
	r.b = r.b[n:]
	return s
}

func (r *reader) strings() []string {
	n := r.uint32()
	if r.bad || n > len(r.b)/4 { // each has a length of 4 bytes
		r.bad = true
		return nil
	}
	ss := make([]string, n)
	for i := range ss {
		ss[i] = r.string()
	}
	return ss
}

// parseRequest reads a frame without its length.
func parseRequest(b []byte) (request, error) {
	if len(b) < framePrefix {
		return request{}, fmt.Errorf("%w: %d bytes", errFrame, len(b))
	}
	q := request{kind: frameKind(b[0]), seq: binary.LittleEndian.Uint64(b[1:])}
	if q.kind == frameKill {
		return q, nil
	}
	r := reader{b: b[framePrefix:]}
	q.spec.Root = r.string()
	q.spec.Dir = r.string()
	q.spec.Stdout = r.string()
	q.spec.Stderr = r.string()
	q.spec.Args = r.strings()
	q.spec.Env = r.strings()
	if r.bad || q.kind != frameRun || len(q.spec.Args) == 0 {
		return request{}, fmt.Errorf("%w: kind %d", errFrame, q.kind)
	}
	return q, nil
}

type outcome int64

const (
	outcomeDone      outcome = iota // the command ended, and nothing of it is left
	outcomeFailed                   // the command could not be started, through no fault of its own
	outcomeLeftovers                // the command ended, but processes of it did not
)

// reply is what the helper says of one request.
type reply struct {
	seq     uint64
	outcome outcome
	killed  bool // because the worker said so
	ended   ending
	result  runner.Result
	message string // what went wrong, or notes, a line each
	// disturbed: the next command would not find the helper as this one did.
	disturbed bool
}

// replyNumbers is the number of the 8-byte numbers with which a reply begins.
const replyNumbers = 21

func (p *reply) append(b []byte) []byte {
	number := func(b bool) int64 {
		if b {
			return 1
		}
		return 0
	}
	res, u := &p.result, &p.result.Usage
	for _, n := range [replyNumbers]int64{
		int64(p.seq), int64(p.outcome), number(p.killed), int64(len(p.message)),
		int64(res.ExitCode), res.Start.UnixNano(), res.End.UnixNano(), res.StdoutBytes, res.StderrBytes,
		int64(u.UserTime), int64(u.SystemTime), u.MaxRSSBytes, u.MinorFaults, u.MajorFaults,
		u.BlockInputs, u.BlockOutputs, u.VoluntarySwitches, u.ForcedSwitches, u.PeakMemoryBytes, int64(p.ended), number(p.disturbed),
	} {
		b = binary.LittleEndian.AppendUint64(b, uint64(n))
	}
	return append(b, p.message...)
}

// maxMessage bounds the message of a reply, which fits with it into the buffer
// of a helperProcess.
const maxMessage = 2048

// parseReply takes a reply off the front of b, if b has all of it, and says how
// many bytes it is.
func parseReply(b []byte) (p reply, size int, ok bool, err error) {
	if len(b) < 8*replyNumbers {
		return reply{}, 0, false, nil
	}
	var n [replyNumbers]int64
	for i := range n {
		n[i] = int64(binary.LittleEndian.Uint64(b[8*i:]))
	}
	if n[3] < 0 || n[3] > maxMessage {
		return reply{}, 0, false, fmt.Errorf("%w: message of %d bytes", errFrame, n[3])
	}
	size = 8*replyNumbers + int(n[3])
	if len(b) < size {
		return reply{}, 0, false, nil
	}
	return reply{
		seq: uint64(n[0]), outcome: outcome(n[1]), killed: n[2] != 0, ended: ending(n[19]), message: string(b[8*replyNumbers : size]), disturbed: n[20] != 0,
		result: runner.Result{
			ExitCode: int(n[4]), Start: time.Unix(0, n[5]), End: time.Unix(0, n[6]), StdoutBytes: n[7], StderrBytes: n[8],
			Usage: runner.Usage{
				UserTime: time.Duration(n[9]), SystemTime: time.Duration(n[10]), MaxRSSBytes: n[11], MinorFaults: n[12], MajorFaults: n[13],
				BlockInputs: n[14], BlockOutputs: n[15], VoluntarySwitches: n[16], ForcedSwitches: n[17], PeakMemoryBytes: n[18],
			},
		},
	}, size, true, nil
}

// Before all frames the worker sends two strings: Options.Config, and Bounds.

// maxText bounds each of them.
const maxText = 1 << 20
