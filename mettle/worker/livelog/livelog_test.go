//go:build linux

package livelog_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/logstream"
	"github.com/mettle-build/mettle/mettle/worker/livelog"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// streams are real ones, that count calls and fail when they are told to.
type streams struct {
	*logstream.Streams

	mu    sync.Mutex
	calls int
	err   error // of all calls, while it is set
	after error // of one Append that has been done all the same
	hang  bool  // Append waits for its context
	lose  bool  // Append finds no stream
}

func (s *streams) call() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	return s.err
}

func (s *streams) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *streams) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls
}

func (s *streams) Create(ctx context.Context, instance string) (name, writeName string, err error) {
	if err := s.call(); err != nil {
		return "", "", err
	}
	return s.Streams.Create(ctx, instance)
}

func (s *streams) Append(ctx context.Context, writeName string, offset int64, data []byte) (int64, error) {
	if err := s.call(); err != nil {
		return 0, err
	}
	s.mu.Lock()
	hang, lose, after := s.hang, s.lose, s.after
	s.after = nil
	s.mu.Unlock()
	if lose {
		return 0, blob.ErrNotFound
	}
	if hang {
		<-ctx.Done()
		return 0, context.Cause(ctx)
	}
	n, err := s.Streams.Append(ctx, writeName, offset, data)
	if after != nil {
		return 0, after
	}
	return n, err
}

func (s *streams) Finish(ctx context.Context, writeName string, offset int64) error {
	if err := s.call(); err != nil {
		return err
	}
	return s.Streams.Finish(ctx, writeName, offset)
}

func (s *streams) Status(ctx context.Context, writeName string) (int64, bool, error) {
	if err := s.call(); err != nil {
		return 0, false, err
	}
	return s.Streams.Status(ctx, writeName)
}

// command is a command whose output the test writes.
type command struct {
	streams        *streams
	stdout, stderr string
	f              *livelog.Follower

	mu    sync.Mutex
	names []livelog.Names
}

func begin(t *testing.T, o logstream.Options) *command {
	t.Helper()
	inner, err := logstream.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(inner.Shutdown)
	c := &command{streams: &streams{Streams: inner}}
	dir := t.TempDir()
	c.stdout, c.stderr = filepath.Join(dir, "stdout"), filepath.Join(dir, "stderr")
	c.follow(t)
	return c
}

// follow begins to follow a command with the same files.
func (c *command) follow(t *testing.T) {
	t.Helper()
	logs, err := livelog.New(livelog.Options{Streams: c.streams})
	if err != nil {
		t.Fatal(err)
	}
	c.f = logs.Follow(t.Context(), livelog.Command{Instance: "i", Stdout: c.stdout, Stderr: c.stderr, Announce: func(_ context.Context, n livelog.Names) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.names = append(c.names, n)
	}})
	t.Cleanup(c.f.Wait)
}

// announced are the last names that were.
func (c *command) announced(t *testing.T, times int) livelog.Names {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.names) != times {
		t.Fatalf("announced %v, want %d times", c.names, times)
	}
	if times == 0 {
		return livelog.Names{}
	}
	return c.names[times-1]
}

func write(t *testing.T, path, data string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(data); err != nil {
		t.Fatal(err)
	}
}

// read reads a stream as far as it goes without waiting, and the error at its end;
// nil where it goes on.
func (c *command) read(t *testing.T, name string) (string, error) {
	t.Helper()
	r, err := c.streams.Open(name, 0)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // where there is nothing, that is told at once
	var all strings.Builder
	p := make([]byte, 4096)
	for {
		n, err := r.Read(ctx, p)
		all.Write(p[:n])
		if errors.Is(err, context.Canceled) {
			return all.String(), nil
		}
		if err != nil {
			return all.String(), err
		}
	}
}

func (c *command) want(t *testing.T, name, want string, wantErr error) {
	t.Helper()
	if got, err := c.read(t, name); got != want || !errors.Is(err, wantErr) {
		t.Errorf("stream %q, %v, want %q, %v", got, err, want, wantErr)
	}
}

// What a command prints can be read while it runs, and nothing is made for what it
// does not print.
func TestLogs_Follow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := begin(t, logstream.Options{})
		write(t, c.stdout, "one\n")
		time.Sleep(999 * time.Millisecond)
		synctest.Wait()
		if n := c.streams.count(); n != 0 {
			t.Errorf("%d calls within the first second", n)
		}
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		names := c.announced(t, 1)
		if names.Stderr != "" || !strings.HasPrefix(names.Stdout, "i/logstreams/") {
			t.Fatalf("names %+v", names)
		}
		c.want(t, names.Stdout, "one\n", nil)
		write(t, c.stdout, "two\n")
		write(t, c.stderr, "oh\n")
		time.Sleep(200 * time.Millisecond)
		synctest.Wait()
		both := c.announced(t, 2)
		if both.Stdout != names.Stdout || both.Stderr == "" {
			t.Fatalf("names %+v after %+v", both, names)
		}
		c.want(t, both.Stdout, "one\ntwo\n", nil)
		c.want(t, both.Stderr, "oh\n", nil)
		write(t, c.stdout, "three\nand of the next command\n")
		c.f.End(livelog.End{StdoutBytes: 14, StderrBytes: 3})
		c.f.Wait()
		c.want(t, both.Stdout, "one\ntwo\nthree\n", io.EOF)
		c.want(t, both.Stderr, "oh\n", io.EOF)
		c.announced(t, 2)
	})
}

// A command that is over soon costs no call, whatever it prints.
func TestLogs_Follow_short(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := begin(t, logstream.Options{})
		write(t, c.stdout, "one\n")
		time.Sleep(900 * time.Millisecond)
		c.f.End(livelog.End{StdoutBytes: 4})
		c.f.Wait()
		time.Sleep(time.Hour)
		if n := c.streams.count(); n != 0 {
			t.Errorf("%d calls", n)
		}
		c.announced(t, 0)
		var none *livelog.Logs
		f := none.Follow(t.Context(), livelog.Command{})
		f.End(livelog.End{})
		f.Wait()
	})
}

// A command that prints nothing for hours is still there; one that goes on elsewhere
// is not, and its stream does not end as if it were complete.
func TestLogs_Follow_silentThenElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := begin(t, logstream.Options{})
		write(t, c.stdout, "one\n")
		time.Sleep(3 * time.Hour)
		name := c.announced(t, 1).Stdout
		c.want(t, name, "one\n", nil)
		c.f.Wait() // without End
		c.want(t, name, "one\n", nil)
		time.Sleep(2 * time.Minute)
		c.want(t, name, "one\n", logstream.ErrAborted)
	})
}

// Large logs pass through in pieces; what is too large for a stream ends it.
func TestLogs_Follow_large(t *testing.T) {
	for _, tc := range []struct {
		name    string
		size    int
		want    int
		wantErr error
	}{{"much", 5<<20 + 1, 5<<20 + 1, io.EOF}, {"too much", 9 << 20, 8 << 20, logstream.ErrFull}} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := begin(t, logstream.Options{MaxStreamBytes: 8 << 20})
				text := strings.Repeat("0123456\n", tc.size/8+1)[:tc.size]
				write(t, c.stdout, text[:tc.size/2])
				time.Sleep(1100 * time.Millisecond)
				write(t, c.stdout, text[tc.size/2:])
				c.f.End(livelog.End{StdoutBytes: int64(tc.size)})
				c.f.Wait()
				got, err := c.read(t, c.announced(t, 1).Stdout)
				if got != text[:tc.want] || !errors.Is(err, tc.wantErr) {
					t.Errorf("%d bytes, %v, want %d and %v", len(got), err, tc.want, tc.wantErr)
				}
			})
		})
	}
}

// Streams that can't be reached are waited for, and nothing is written twice.
func TestLogs_Follow_unavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := begin(t, logstream.Options{})
		away := fmt.Errorf("%w: restarting", blob.ErrUnavailable)
		c.streams.set(func() { c.streams.err = away })
		write(t, c.stdout, "one\n")
		time.Sleep(10 * time.Second)
		c.announced(t, 0)
		c.streams.set(func() { c.streams.err = nil })
		time.Sleep(time.Second)
		name := c.announced(t, 1).Stdout
		c.want(t, name, "one\n", nil)
		// An answer is lost.
		c.streams.set(func() { c.streams.after = away })
		write(t, c.stdout, "two\n")
		time.Sleep(time.Second)
		c.want(t, name, "one\ntwo\n", nil)
		// At the end there is not much time.
		c.streams.set(func() { c.streams.err = away })
		write(t, c.stdout, "three\n")
		c.f.End(livelog.End{StdoutBytes: 14})
		time.Sleep(time.Second)
		c.streams.set(func() { c.streams.err = nil })
		c.f.Wait()
		c.want(t, name, "one\ntwo\nthree\n", io.EOF)
	})
}

// A server that was restarted has lost its streams: there is a new one, with all that
// was printed.
func TestLogs_Follow_lost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := begin(t, logstream.Options{})
		write(t, c.stdout, "one\n")
		time.Sleep(1100 * time.Millisecond)
		first := c.announced(t, 1).Stdout
		c.streams.set(func() { c.streams.err = fmt.Errorf("%w: it was restarted", blob.ErrNotFound) })
		write(t, c.stdout, "two\n")
		time.Sleep(250 * time.Millisecond)
		c.streams.set(func() { c.streams.err = nil })
		time.Sleep(time.Second)
		second := c.announced(t, 2).Stdout
		if second == first {
			t.Error("it is the same stream")
		}
		c.want(t, second, "one\ntwo\n", nil)
		// One that loses all of them is left alone.
		c.streams.set(func() { c.streams.after = nil; c.streams.lose = true })
		write(t, c.stdout, "three\n")
		time.Sleep(time.Minute)
		calls := c.streams.count()
		time.Sleep(time.Hour)
		if n := c.streams.count(); n != calls {
			t.Errorf("%d calls after %d", n, calls)
		}
		c.f.End(livelog.End{StdoutBytes: 14})
		c.f.Wait()
	})
}

// What does not answer holds the command's end up no longer than Grace.
func TestLogs_Follow_hanging(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := begin(t, logstream.Options{})
		c.streams.set(func() { c.streams.hang = true })
		write(t, c.stdout, "one\n")
		time.Sleep(2 * time.Second)
		c.f.End(livelog.End{StdoutBytes: 4})
		ended := time.Now()
		c.f.Wait()
		if waited := time.Since(ended); waited > 2*time.Second {
			t.Errorf("waited for %v", waited)
		}
	})
}

// A server that takes no streams is asked once for each file.
func TestLogs_Follow_refused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := begin(t, logstream.Options{})
		c.streams.set(func() { c.streams.err = errors.New("no such service") })
		write(t, c.stdout, "one\n")
		time.Sleep(time.Hour)
		if n := c.streams.count(); n != 1 {
			t.Errorf("%d calls, want 1", n)
		}
		c.f.End(livelog.End{StdoutBytes: 4})
		c.f.Wait()
		c.announced(t, 0)
	})
}

// Nothing is read but a file that lies where the command's output was to be.
func TestLogs_Follow_notAFile(t *testing.T) {
	for name, replace := range map[string]func(path string) error{
		"symlink": func(path string) error { return os.Symlink("/etc/passwd", path) },
		"fifo":    func(path string) error { return unix.Mkfifo(path, 0o600) },
		"dir":     func(path string) error { return os.Mkdir(path, 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := begin(t, logstream.Options{})
				if err := replace(c.stdout); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute)
				c.f.End(livelog.End{StdoutBytes: 4})
				c.f.Wait()
				if n := c.streams.count(); n != 0 {
					t.Errorf("%d calls", n)
				}
			})
		})
	}
}

// The files may be made when the command begins at last, in place of empty ones.
func TestLogs_Follow_madeLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := begin(t, logstream.Options{})
		write(t, c.stdout, "")
		time.Sleep(time.Minute)
		if err := os.Remove(c.stdout); err != nil {
			t.Fatal(err)
		}
		write(t, c.stdout, "one\n")
		time.Sleep(time.Second)
		c.want(t, c.announced(t, 1).Stdout, "one\n", nil)
	})
}

// A file that shrinks is its command's own business.
func TestLogs_Follow_truncated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := begin(t, logstream.Options{})
		write(t, c.stdout, "a line that goes\n")
		time.Sleep(1100 * time.Millisecond)
		if err := os.Truncate(c.stdout, 0); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		write(t, c.stdout, "short\n")
		time.Sleep(time.Minute)
		c.f.End(livelog.End{StdoutBytes: 6})
		c.f.Wait()
		c.want(t, c.announced(t, 1).Stdout, "a line that goes\n", io.EOF)
	})
}

// BenchmarkLogs_Follow is what a command costs that is over soon.
func BenchmarkLogs_Follow(b *testing.B) {
	s, err := logstream.New(logstream.Options{})
	if err != nil {
		b.Fatal(err)
	}
	logs, err := livelog.New(livelog.Options{Streams: s})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		f := logs.Follow(b.Context(), livelog.Command{Stdout: "x", Stderr: "y"})
		f.End(livelog.End{})
		f.Wait()
	}
}
