// Package logstream keeps log streams: what a command prints, for those who want to
// read it while it runs. Each has one writer, which appends to it until it is
// finished, and any number of readers, who get all of it from the beginning and then
// what comes, as it comes.
//
// Streams are in memory, of one server, and bounded: each by MaxStreamBytes, all by
// MaxBytes and MaxStreams, for which the oldest that are finished make room before
// their time. One that is finished stays for Keep; one whose writer is not heard of
// for WriterTimeout ends with ErrAborted, after what there was. Nothing that is here
// is needed for good: what an action has printed is part of its result, and that is
// in the CAS.
//
// Whoever knows the name of a stream may read it, and whoever knows the other name
// may write; nobody can guess either. Names say which server has the stream, so that
// another one can tell that a stream is elsewhere from that there is none.
//
// Elan/rpc serves them as the LogStream API and by ByteStream. In mettle dual, the
// worker writes to them without gRPC.
package logstream

import (
	"cmp"
	"container/list"
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/resource"
)

// The classes of errors.
var (
	// ErrNotFound: there is no such stream, or not any more.
	ErrNotFound = errors.New("there is no such log stream")
	// ErrElsewhere: if there is one, another server has it. It wraps ErrNotFound.
	ErrElsewhere = fmt.Errorf("%w here; it is another server's, or from before a restart", ErrNotFound)
	// ErrInvalid: a name is for the other use.
	ErrInvalid = errors.New("invalid use of a log stream's name")
	// ErrOffset: bytes are to be written where some are already, or would leave a gap;
	// or to be read from behind the end.
	ErrOffset = errors.New("wrong offset in a log stream")
	// ErrFinished: nothing can be written any more.
	ErrFinished = errors.New("the log stream is finished")
	// ErrFull: there is no room for more. The stream has ended there.
	ErrFull = errors.New("no room for more of a log stream")
	// ErrAborted: the stream ends because its writer has gone.
	ErrAborted = errors.New("the writer of the log stream has gone before its end")
	// ErrClosed: the server shuts down.
	ErrClosed = errors.New("log streams end, the server shuts down")
)

// Options are those of New.
type Options struct {
	// MaxStreamBytes bounds a stream. 0: 8 MiB, which is more than anybody reads.
	MaxStreamBytes int64
	// MaxBytes bounds all streams together. 0: 64 MiB.
	MaxBytes int64
	// MaxStreams bounds their number. 0: 16,384.
	MaxStreams int
	// Keep is how long a stream is there after its end. 0: 10 minutes.
	Keep time.Duration
	// WriterTimeout is how long a writer may be silent. 0: a minute.
	WriterTimeout time.Duration
	// Registerer takes the metrics. nil: there are none.
	Registerer prometheus.Registerer
}

func (o Options) withDefaults() (Options, error) {
	if o.MaxStreamBytes < 0 || o.MaxBytes < 0 || o.MaxStreams < 0 || o.Keep < 0 || o.WriterTimeout < 0 {
		return o, errors.New("log streams: negative limit")
	}
	o.MaxStreamBytes = cmp.Or(o.MaxStreamBytes, 8<<20)
	o.MaxBytes = cmp.Or(o.MaxBytes, 64<<20)
	o.MaxStreams = cmp.Or(o.MaxStreams, 16_384)
	o.Keep = cmp.Or(o.Keep, 10*time.Minute)
	o.WriterTimeout = cmp.Or(o.WriterTimeout, time.Minute)
	return o, nil
}

// serverLen is how long the part of an id is that says which server has the stream:
// enough to tell some dozens apart.
const serverLen = 8

// Streams are the log streams of a server. It is safe for concurrent use.
type Streams struct {
	o       Options
	server  string
	metrics *metrics
	closed  chan struct{} // by Shutdown
	once    sync.Once

	// mu guards what is below. A stream's own mu may be locked while it is held, and
	// not the other way round.
	mu    sync.Mutex
	byID  map[string]*stream
	ended list.List      // of *stream, the oldest first
	bytes int64          // in all streams, and on their way to them
	open  map[string]int // those that have not ended, by owner
}

// New checks the options. The caller ends it by Shutdown.
func New(o Options) (*Streams, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Streams{o: o, server: rand.Text()[:serverLen], closed: make(chan struct{}), byID: map[string]*stream{}, open: map[string]int{}}
	s.metrics, err = newMetrics(o.Registerer, s)
	return s, err
}

// Create makes a stream of an instance. Readers are told the name, and nobody but
// the writer the other one. Where there is no room for it, the error wraps ErrFull.
func (s *Streams) Create(ctx context.Context, parent string) (name, writeName string, err error) {
	return s.CreateFor(ctx, "", parent)
}

// CreateFor is Create for an owner, any string that names one, who may have half of
// MaxStreams that have not ended, so that nobody takes all; but "" may.
func (s *Streams) CreateFor(_ context.Context, owner, parent string) (name, writeName string, err error) {
	if err := resource.CheckInstance(parent); err != nil {
		return "", "", fmt.Errorf("parent of a log stream: %w", err)
	}
	st := &stream{
		name:    resource.LogStreamName{Parent: parent, ID: s.server + "-" + rand.Text()},
		token:   rand.Text(),
		owner:   owner,
		heard:   time.Now(),
		changed: make(chan struct{}),
	}
	s.mu.Lock()
	if s.isClosed() {
		s.mu.Unlock()
		return "", "", ErrClosed
	}
	if most := max(1, s.o.MaxStreams/2); owner != "" && s.open[owner] >= most {
		s.mu.Unlock()
		s.metrics.refused.Inc()
		return "", "", fmt.Errorf("%w: you have %d that have not ended", ErrFull, most)
	}
	var dropped *stream
	if len(s.byID) >= s.o.MaxStreams {
		if dropped = s.oldest(); dropped == nil {
			s.mu.Unlock()
			s.metrics.refused.Inc()
			return "", "", fmt.Errorf("%w: there are %d already", ErrFull, s.o.MaxStreams)
		}
	}
	s.byID[st.name.ID] = st
	s.open[owner]++
	// Under mu, which its end needs too.
	st.timer = time.AfterFunc(s.o.WriterTimeout, func() { s.timeout(st) })
	s.mu.Unlock()
	if dropped != nil {
		dropped.drop()
	}
	s.metrics.created.Inc()
	w := st.name
	w.Token = st.token
	return st.name.String(), w.String(), nil
}

// isClosed reports whether Shutdown was called.
func (s *Streams) isClosed() bool {
	select {
	case <-s.closed:
		return true
	default:
		return false
	}
}

// find finds a stream by its name, or by that for its writer.
func (s *Streams) find(name string, writer bool) (*stream, error) {
	n, ok := resource.ParseLogStream(name)
	if !ok {
		return nil, fmt.Errorf("%w: %.200q is none", ErrInvalid, name)
	}
	if writer != (n.Token != "") {
		return nil, fmt.Errorf("%w: a stream is read by its name, and written to by its write_resource_name", ErrInvalid)
	}
	if s.isClosed() {
		return nil, ErrClosed
	}
	s.mu.Lock()
	st := s.byID[n.ID]
	s.mu.Unlock()
	// A name whose token is wrong tells no more than one of no stream.
	if st == nil || st.name.Parent != n.Parent || writer && subtle.ConstantTimeCompare([]byte(st.token), []byte(n.Token)) == 0 {
		if !strings.HasPrefix(n.ID, s.server+"-") {
			return nil, ErrElsewhere
		}
		return nil, fmt.Errorf("%w: it ended over %v ago, or made room for others", ErrNotFound, s.o.Keep)
	}
	return st, nil
}

// Status is how many bytes the stream has, and whether it has ended.
func (s *Streams) Status(_ context.Context, writeName string) (committed int64, ended bool, err error) {
	st, err := s.find(writeName, true)
	if err != nil {
		return 0, false, err
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.size, st.ended, nil
}

// Append appends data, which it does not keep, at offset, which is how many bytes
// the stream has: otherwise the error wraps ErrOffset. It returns how many it has
// then. Where there is no room, the stream ends, and the error wraps ErrFull. To
// append nothing is to say that the writer is still there.
func (s *Streams) Append(_ context.Context, writeName string, offset int64, data []byte) (committed int64, err error) {
	st, err := s.find(writeName, true)
	if err != nil {
		return 0, err
	}
	n := int64(len(data))
	if n > 0 && !s.reserve(n) {
		s.end(st, fmt.Errorf("%w: there are too many", ErrFull))
		return st.length(), fmt.Errorf("%w: there are too many", ErrFull)
	}
	committed, err = st.append(offset, data, s.o.MaxStreamBytes)
	if err != nil {
		s.release(n)
		if errors.Is(err, ErrFull) {
			s.end(st, err)
		}
	}
	return committed, err
}

// Finish ends a stream that has offset bytes. To finish one again is no error.
func (s *Streams) Finish(_ context.Context, writeName string, offset int64) error {
	st, err := s.find(writeName, true)
	if err != nil {
		return err
	}
	if n := st.length(); n != offset {
		return fmt.Errorf("%w: it has %d bytes, and is to end at %d", ErrOffset, n, offset)
	}
	s.end(st, nil)
	return nil
}

// Hold keeps a silent writer from being taken for one that is gone, until release.
func (s *Streams) Hold(writeName string) (release func(), err error) {
	st, err := s.find(writeName, true)
	if err != nil {
		return nil, err
	}
	st.mu.Lock()
	st.holders++
	st.mu.Unlock()
	return func() {
		st.mu.Lock()
		st.holders--
		st.heard = time.Now()
		st.mu.Unlock()
	}, nil
}

// Shutdown ends all streams: their readers and writers get ErrClosed. It may be
// called twice.
func (s *Streams) Shutdown() {
	s.once.Do(func() {
		s.mu.Lock()
		close(s.closed)
		for _, st := range s.byID {
			st.timer.Stop()
		}
		s.byID = map[string]*stream{}
		s.ended.Init()
		s.bytes = 0
		s.mu.Unlock()
	})
}
