//go:build linux

package persistent

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	persistentpb "github.com/mettle-build/mettle/proto/persistent"
)

// encode is a request as it is written.
func encode(protocol Protocol, req *persistentpb.WorkRequest) ([]byte, error) {
	if protocol == JSON {
		data, err := protojson.Marshal(req) // it has no line breaks
		return append(data, '\n'), err
	}
	b := protowire.AppendVarint(make([]byte, 0, proto.Size(req)+binary.MaxVarintLen64), uint64(proto.Size(req)))
	return proto.MarshalOptions{}.MarshalAppend(b, req)
}

// responses reads a process's stdout. It is used by one goroutine at a time.
type responses struct {
	from     *meter
	protocol Protocol
	bytes    *bufio.Reader // Proto
	values   *json.Decoder // JSON
}

var (
	errTooLong = errors.New("its response is too large")
	errNoise   = errors.New("it wrote to its stdout unasked")
	errSilent  = errors.New("it did not answer")
	errEnded   = errors.New("its stdout ended before it had answered")
)

func newResponses(stdout io.Reader, protocol Protocol, maxBytes int64) *responses {
	r := &responses{from: &meter{r: stdout, max: maxBytes}, protocol: protocol}
	if protocol == JSON {
		r.values = json.NewDecoder(r.from)
	} else {
		r.bytes = bufio.NewReader(r.from)
	}
	return r
}

// read reads the response to the one request that was sent.
func (r *responses) read() (*persistentpb.WorkResponse, error) {
	r.from.reset()
	resp := &persistentpb.WorkResponse{}
	err := r.next(resp)
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, errEnded
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, errSilent
	case err != nil:
		return nil, fmt.Errorf("what it wrote is no response: %w", err)
	case resp.GetRequestId() != 0:
		return nil, fmt.Errorf("it answered request %d, and was asked request 0", resp.GetRequestId())
	case resp.GetWasCancelled():
		return nil, errors.New("it answered that the request was cancelled, which it was not")
	}
	return resp, nil
}

func (r *responses) next(resp *persistentpb.WorkResponse) error {
	if r.protocol == JSON {
		var raw json.RawMessage
		if err := r.values.Decode(&raw); err != nil {
			return err
		}
		return protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(raw, resp)
	}
	size, err := binary.ReadUvarint(r.bytes)
	if err != nil {
		return err
	}
	if size > uint64(r.from.max) {
		return fmt.Errorf("%w: of %d bytes, at most %d are taken", errTooLong, size, r.from.max)
	}
	// It grows as bytes arrive: the size alone is only a word.
	var data bytes.Buffer
	if _, err := io.CopyN(&data, r.bytes, int64(size)); err != nil {
		return err
	}
	return proto.Unmarshal(data.Bytes(), resp)
}

// quiet reports, by an error, whether there is anything to read though nothing was
// asked.
func (r *responses) quiet() error {
	r.from.reset()
	var rest []byte
	if r.protocol == JSON {
		rest, _ = io.ReadAll(r.values.Buffered()) // of bytes in memory
	} else {
		rest, _ = r.bytes.Peek(r.bytes.Buffered()) // as above
	}
	if r.isNoise(rest) {
		r.from.note(rest)
		return fmt.Errorf("%w: %w", errProcess, errNoise)
	}
	stdout, ok := r.from.r.(*os.File)
	for b := make([]byte, 512); ok; {
		n, err := readNow(stdout, b)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case err != nil:
			return fmt.Errorf("%w: %w", errProcess, err)
		case n == 0:
			return fmt.Errorf("%w: it closed its stdout", errProcess)
		case r.isNoise(b[:n]):
			r.from.note(b[:n])
			return fmt.Errorf("%w: %w", errProcess, errNoise)
		}
	}
	return nil
}

// isNoise reports whether bytes that follow a response are not the end of its line.
func (r *responses) isNoise(b []byte) bool {
	if r.protocol == JSON {
		b = bytes.TrimSpace(b)
	}
	return len(b) > 0
}

// seen is the beginning of what was read since the last request.
func (r *responses) seen() []byte { return r.from.first }

// meter bounds what is read for one response, and keeps its beginning.
type meter struct {
	r     io.Reader
	max   int64
	n     int64
	first []byte
}

// maxFirst is how much of a stdout is shown.
const maxFirst = 256

func (m *meter) reset() { m.n, m.first = 0, nil }

func (m *meter) note(b []byte) {
	m.first = append(m.first, b[:min(len(b), maxFirst-len(m.first))]...)
}

func (m *meter) Read(b []byte) (int, error) {
	// A response, and the length before it, and what a reader reads ahead.
	if m.n > m.max+4096 {
		return 0, fmt.Errorf("%w: over %d bytes", errTooLong, m.max)
	}
	n, err := m.r.Read(b)
	m.n += int64(n)
	m.note(b[:n])
	return n, err
}
