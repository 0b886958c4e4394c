//go:build linux

package runnertest

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
)

// pipes are the ends of a command's streams that the test has.
type pipes struct {
	stdin, stdout, stderr *os.File
}

// piped is a bench whose runner has streams.
func (s Subject) piped(t *testing.T) (*Bench, pipes) {
	t.Helper()
	var files [6]*os.File
	for i := 0; i < len(files); i += 2 {
		var err error
		if files[i], files[i+1], err = os.Pipe(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = files[i].Close()
			_ = files[i+1].Close()
		})
	}
	s.New = func(user helper.User) (Runner, error) {
		r, err := s.Streaming(user, &runner.Streams{Stdin: files[0], Stdout: files[3], Stderr: files[5]})
		for _, f := range []*os.File{files[0], files[3], files[5]} {
			_ = f.Close()
		}
		return r, err
	}
	b := s.NewBench(t)
	b.Spec.Stdout, b.Spec.Stderr = "", ""
	return b, pipes{files[1], files[2], files[4]}
}

// streams checks that a command can be talked to, and that its streams end with it.
func (s Subject) streams(t *testing.T) {
	b, p := s.piped(t)
	b.Spec.Args = []string{"/bin/sh", "-c", `read a; echo "got $a"; echo oh >&2; read b; (trap "" TERM; sleep 1000) & exit 3`}
	type ran struct {
		runner.Result
		error
	}
	ended := make(chan ran, 1)
	go func() {
		res, err := b.Run(t.Context(), b.Spec)
		ended <- ran{res, err}
	}()
	if _, err := p.stdin.WriteString("one\n"); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 100)
	if n, err := p.stdout.Read(line); err != nil || string(line[:n]) != "got one\n" {
		t.Errorf("stdout %q, %v", line[:n], err)
	}
	if _, err := p.stdin.WriteString("two\n"); err != nil {
		t.Fatal(err)
	}
	// What it has left behind had them open, too.
	if rest, err := io.ReadAll(p.stdout); err != nil || len(rest) > 0 {
		t.Errorf("the rest of stdout is %q, %v", rest, err)
	}
	if all, err := io.ReadAll(p.stderr); err != nil || string(all) != "oh\n" {
		t.Errorf("stderr %q, %v", all, err)
	}
	if r := <-ended; r.error != nil || r.ExitCode != 3 || r.StdoutBytes != 0 || r.StderrBytes != 0 {
		t.Errorf("result %+v, error %v", r.Result, r.error)
	}
	if _, err := b.Run(t.Context(), b.Spec); !errors.Is(err, runner.ErrUsed) {
		t.Errorf("another command: error %v, want ErrUsed", err)
	}
	s.streamsOfNobody(t)
	s.streamsAfterKill(t)
}

// streamsOfNobody checks that a program that is not there is explained as usual.
func (s Subject) streamsOfNobody(t *testing.T) {
	b, p := s.piped(t)
	b.Spec.Args = []string{"./nowhere"}
	res, err := b.Run(t.Context(), b.Spec)
	if err != nil || res.ExitCode != 127 {
		t.Errorf("result %+v, error %v", res, err)
	}
	if all, err := io.ReadAll(p.stderr); err != nil || !strings.Contains(string(all), "nowhere") {
		t.Errorf("stderr %q, %v", all, err)
	}
	if all, err := io.ReadAll(p.stdout); err != nil || len(all) > 0 {
		t.Errorf("stdout %q, %v", all, err)
	}
}

// streamsAfterKill checks that they end with a command that is killed.
func (s Subject) streamsAfterKill(t *testing.T) {
	b, p := s.piped(t)
	b.Spec.Args = []string{"/bin/sh", "-c", "echo up; sleep 1000 & sleep 1000"}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := b.Run(ctx, b.Spec)
		ended <- err
	}()
	if _, err := io.ReadFull(p.stdout, make([]byte, 3)); err != nil {
		t.Error(err)
	}
	cancel()
	if _, err := io.ReadAll(p.stdout); err != nil {
		t.Errorf("stdout: %v", err)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want that of the context", err)
	}
}
