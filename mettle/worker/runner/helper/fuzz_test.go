//go:build linux

package helper

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// FuzzParseRequest: a request is read as it was made, or refused, and takes no more
// memory than it has bytes.
func FuzzParseRequest(f *testing.F) {
	f.Add(appendRequest(nil, 7, &runner.Spec{Root: "/r", Dir: "d", Stdout: "o", Stderr: "e", Args: []string{"a", ""}, Env: []string{"A=b"}})[frameHeader:])
	f.Add(appendKill(nil, 8)[frameHeader:])
	f.Add([]byte("\x01\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, data []byte) {
		q, err := parseRequest(data)
		if err != nil {
			return
		}
		if q.kind == frameKill {
			return
		}
		made := appendRequest(nil, q.seq, &q.spec)[frameHeader:]
		if !bytes.HasPrefix(data, made) {
			t.Errorf("%x is read as %+v, which is %x", data, q, made)
		}
	})
}

// FuzzNext: frames come in pieces, and are the same as in one.
func FuzzNext(f *testing.F) {
	two := appendRequest(nil, 7, &runner.Spec{Args: []string{"a"}})
	two = appendKill(two, 8)
	f.Add(two, uint8(5))
	f.Add([]byte("\xff\xff\xff\xff"), uint8(1))
	read := func(h *helper) (got []uint64, err error) {
		for {
			q, ok, err := h.next()
			if err != nil || !ok {
				return got, err
			}
			got = append(got, q.seq)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, cut uint8) {
		whole := &helper{in: bytes.Clone(data)}
		want, wantErr := read(whole)
		if cap(whole.in) > frameHeader+maxFrame {
			t.Errorf("%d bytes of room", cap(whole.in))
		}
		pieces := &helper{}
		var got []uint64
		var err error
		for piece := range slices.Chunk(data, max(1, int(cut))) {
			if err != nil {
				break
			}
			pieces.in = append(pieces.in, piece...)
			var more []uint64
			more, err = read(pieces)
			got = append(got, more...)
		}
		if !slices.Equal(got, want) || (err == nil) != (wantErr == nil) {
			t.Errorf("in pieces of %d: %d, %v; as a whole %d, %v", cut, got, err, want, wantErr)
		}
	})
}

// FuzzParseReply: a reply is read as it was made, or waited for, or refused.
func FuzzParseReply(f *testing.F) {
	now := time.Unix(5, 6)
	f.Add((&reply{seq: 7, killed: true, message: "m", disturbed: true, result: runner.Result{ExitCode: 3, Start: now, End: now, StdoutBytes: 4}}).append(nil))
	f.Add(bytes.Repeat([]byte{0xff}, 8*replyNumbers))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, size, ok, err := parseReply(data)
		if !ok {
			if err == nil && len(data) >= 8*replyNumbers+maxMessage {
				t.Error("waits for more than can come")
			}
			return
		}
		if made := p.append(nil); len(made) != size || size > len(data) {
			t.Errorf("%d bytes are read as %+v, which is %d bytes", size, p, len(made))
		}
	})
}

// FuzzParentIn: a process may call itself what it likes.
func FuzzParentIn(f *testing.F) {
	f.Add("sh) R 1 2 (", 7)
	f.Add("", -1)
	f.Fuzz(func(t *testing.T, name string, parent int) {
		if got := parentIn(fmt.Appendf(nil, "12 (%s) S %d 1 1 0", name, parent)); got != parent {
			t.Errorf("of %q the parent is %d, want %d", name, got, parent)
		}
		_ = parentIn([]byte(name))
	})
}
