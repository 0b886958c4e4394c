package e2e_test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mettle-build/mettle/metrics/logtest"
	"github.com/mettle-build/mettle/mettle/queue/pubsub/pubsubtest"
)

// startTimeout is far beyond what a start takes, even on a busy machine.
const startTimeout = 60 * time.Second

// binaries builds the two programs once for all tests, with the race detector
// where the tests have it, and returns the directory that they are in.
//
//nolint:gochecknoglobals // built once for all tests
var binaries = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "mettle-e2e-bin")
	if err != nil {
		return "", err
	}
	args := []string{"build", "-o", dir + "/"}
	if raceEnabled {
		args = append(args, "-race")
	}
	cmd := exec.Command("go", append(args, "./mettle", "./elan")...)
	cmd.Dir = filepath.Join("..", "..")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", cmd, err, out)
	}
	return dir, nil
})

func binary(t *testing.T, name string) string {
	t.Helper()
	dir, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, name)
}

func TestMain(m *testing.M) {
	if dir := os.Getenv(natsDirVar); dir != "" {
		os.Exit(natsMain(dir, os.Args[1:]))
	}
	if addr := os.Getenv(bucketVar); addr != "" {
		os.Exit(bucketMain(addr))
	}
	if pubsubtest.RunAsProcess() {
		return
	}
	code := m.Run()
	if dir, err := binaries(); err == nil {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}

// A server is a real process of ours.
type server struct {
	t       *testing.T
	program string // mettle or elan, or the path of another
	version string // the directory that mettle or elan is in; empty: that of this tree
	args    []string
	env     []string // beside our own
	within  []string // a command that executes the program, with its arguments; nil: none
	says    string   // is in a line that is printed when it serves
	// Port and HTTPPort stay the same when the server is started again.
	Port, HTTPPort int

	cmd    *exec.Cmd
	exited chan struct{} // closed when cmd has ended
	err    error         // how cmd ended, once exited is closed
	log    *logtest.Buffer
}

// Addr is the server's gRPC address, host:port.
func (s *server) Addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.Port)) }

// startDual starts `mettle dual` on free ports with the given store directory
// and waits until it serves. It ends with the test.
func startDual(t *testing.T, dir string, flags ...string) *server {
	t.Helper()
	return start(t, "mettle", append([]string{"dual", "--dir=" + dir}, flags...))
}

// startElan starts `elan` likewise.
func startElan(t *testing.T, storage string, flags ...string) *server {
	t.Helper()
	return start(t, "elan", append([]string{"--storage=" + storage}, flags...))
}

func start(t *testing.T, program string, args []string) *server {
	t.Helper()
	s := newServer(t, program, args)
	s.args = append(s.args, "--port="+strconv.Itoa(s.Port))
	s.Start()
	return s
}

// newServer is a server that has yet to be started, with a port for HTTP. It ends
// with the test.
func newServer(t *testing.T, program string, args []string) *server {
	t.Helper()
	s := &server{t: t, program: program, says: "grpc://", Port: freePort(t), HTTPPort: freePort(t), log: &logtest.Buffer{}}
	s.args = append(slices.Clone(args), "--http_port="+strconv.Itoa(s.HTTPPort))
	t.Cleanup(func() {
		s.Kill()
		if t.Failed() {
			t.Logf("log of %s:\n%s", s.program, s.log)
		}
	})
	return s
}

// newSelf is newServer of this test's own program, which TestMain makes another
// one by what is in its environment.
func newSelf(t *testing.T, says string) *server {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(t, self, nil)
	s.args, s.says = nil, says
	return s
}

// Start starts the process and returns when it serves.
func (s *server) Start() {
	s.t.Helper()
	path := s.program
	switch {
	case s.version != "":
		path = filepath.Join(s.version, path)
	case !filepath.IsAbs(path):
		path = binary(s.t, path)
	}
	argv := slices.Concat(s.within, []string{path}, s.args)
	s.cmd = exec.Command(argv[0], argv[1:]...) //nolint:noctx // ended by Kill or Terminate
	s.cmd.Env = append(os.Environ(), s.env...)
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	s.cmd.Stderr = s.log
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	ready := make(chan struct{})
	read := make(chan struct{})
	go func() {
		defer close(read)
		lines := bufio.NewScanner(stdout)
		var once sync.Once
		for lines.Scan() {
			fmt.Fprintln(s.log, lines.Text())
			if strings.Contains(lines.Text(), s.says) {
				once.Do(func() { close(ready) })
			}
		}
	}()
	s.exited = make(chan struct{})
	go func() {
		<-read
		s.err = s.cmd.Wait()
		close(s.exited)
	}()
	select {
	case <-ready:
	case <-s.exited:
		s.t.Fatalf("%s %s ended: %v\n%s", s.program, strings.Join(s.args, " "), s.err, s.log)
	case <-time.After(startTimeout):
		s.t.Fatalf("%s %s did not say that it serves within %v\n%s", s.program, strings.Join(s.args, " "), startTimeout, s.log)
	}
}

// Kill kills the process as kill -9 does, and waits until it is gone.
func (s *server) Kill() {
	if s.cmd == nil || s.cmd.Process == nil {
		return // it was not started
	}
	_ = s.cmd.Process.Kill()
	<-s.exited
}

// Terminate sends SIGTERM and returns how the process ended.
func (s *server) Terminate(ctx context.Context) error {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.exited:
		return s.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// storeDir is a directory that the users of actions can pass through, as those
// of t.TempDir are not.
func storeDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o711); err != nil { //nolint:gosec // the point of it
		t.Fatal(err)
	}
	return dir
}

// givenPorts are those that freePort has returned: the system may well name one
// twice, before anybody listens there.
//
//nolint:gochecknoglobals // shared by all tests
var givenPorts sync.Map

func freePort(t *testing.T) int {
	t.Helper()
	for {
		l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		_ = l.Close()
		if _, given := givenPorts.LoadOrStore(port, true); !given {
			return port
		}
	}
}

// kind says what a server is: api, worker, elan, bucket, or the broker.
func (s *server) kind() string {
	switch {
	case s.program == "mettle":
		return s.args[0]
	case s.program == os.Getenv(gatewayVar):
		return "bucket"
	case filepath.IsAbs(s.program):
		return "broker"
	}
	return s.program
}

// commandIn is a command of mettle with more in its environment.
func commandIn(t *testing.T, env []string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), binary(t, "mettle"), args...)
	cmd.Env = append(os.Environ(), env...)
	return cmd
}
