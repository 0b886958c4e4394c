package pubsubtest

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
)

// Main is the fake as a program: it serves until ctx is done. It writes the line
// "listening on HOST:PORT" to out once it does. The arguments are flags;
// the shares of calls that fail are those of Chaos.
func Main(ctx context.Context, args []string, out io.Writer) error {
	var c Chaos
	flags := flag.NewFlagSet("fakepubsub", flag.ContinueOnError)
	flags.SetOutput(out)
	addr := flags.String("addr", "localhost:0", "host:port to listen on")
	flags.Uint64Var(&c.Seed, "seed", 1, "decides which calls fail")
	flags.Float64Var(&c.Unavailable, "unavailable", 0, "share of calls that are refused")
	flags.Float64Var(&c.LoseAnswers, "lose_answers", 0, "share of calls that are made and whose answers are lost")
	flags.Float64Var(&c.Twice, "twice", 0, "share of calls that are made twice")
	flags.Float64Var(&c.Delay, "delay", 0, "share of calls that are late")
	flags.DurationVar(&c.MaxDelay, "max_delay", 0, "how late they are at most (default 200ms)")
	flags.Float64Var(&c.DropAcks, "drop_acks", 0, "share of acknowledgements that are answered and not made")
	flags.Float64Var(&c.Duplicate, "duplicate", 0, "share of pulls whose messages go to somebody else as well")
	flags.DurationVar(&c.BurstEvery, "burst_every", 0, "how often all calls are refused for a while")
	flags.DurationVar(&c.Burst, "burst", 0, "for how long")
	flags.DurationVar(&c.CutEvery, "cut_every", 0, "how often all streams are cut")
	var l Lacks
	flags.BoolVar(&l.Filters, "lack_filters", false, "let subscriptions have all messages of their topics")
	flags.BoolVar(&l.DeadLetters, "lack_dead_letters", false, "do not count deliveries")
	flags.BoolVar(&l.Updates, "lack_updates", false, "refuse to change subscriptions")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	s, err := New(*addr) //nolint:contextcheck // it lives until Close
	if err != nil {
		return err
	}
	s.Lack(l)
	if _, err := fmt.Fprintln(out, listening+s.Addr); err != nil {
		return errors.Join(err, s.Close())
	}
	s.Fail(ctx, c)
	return s.Close()
}

const listening = "listening on "

// env is set for the processes that Start starts.
const env = "METTLE_FAKE_PUBSUB_PROCESS"

// RunAsProcess runs Main where this process was started by Start, until the
// process that did so is gone, and returns true then. A TestMain calls it first,
// and only returns after it has.
func RunAsProcess() bool {
	if os.Getenv(env) == "" {
		return false
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM) // as in a main
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		io.Copy(io.Discard, os.Stdin) //nolint:errcheck // it ends with the other process
		cancel()
	}()
	if err := Main(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	return true
}

// A Process is a fake Pub/Sub in a process of its own.
type Process struct {
	// Addr is the host:port to be set as PUBSUB_EMULATOR_HOST.
	Addr string

	cmd   *exec.Cmd
	stdin io.Closer
}

// Start starts this test's program once more, as a fake Pub/Sub with Main's
// flags, and waits until it listens. Its TestMain must call RunAsProcess. The
// process ends with t, if it was not killed before; to have it back with nothing
// of what it knew, it is started again with the flag addr.
func Start(tb testing.TB, args ...string) *Process {
	tb.Helper()
	program, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command(program, args...) //nolint:noctx // it is killed by name
	cmd.Env = append(os.Environ(), env+"=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	p := &Process{cmd: cmd, stdin: in}
	tb.Cleanup(p.Kill)
	line, err := bufio.NewReader(out).ReadString('\n')
	addr, ok := strings.CutPrefix(strings.TrimSpace(line), listening)
	if !ok {
		tb.Fatalf("the fake Pub/Sub said %q, %v; does TestMain call pubsubtest.RunAsProcess?", line, err)
	}
	p.Addr = addr
	return p
}

// Kill ends the process at once, with all that it knows. It may be called twice.
func (p *Process) Kill() {
	if p.cmd.ProcessState != nil {
		return
	}
	p.cmd.Process.Kill() //nolint:errcheck // it may have ended
	p.cmd.Wait()         //nolint:errcheck // killed
	p.stdin.Close()      //nolint:errcheck // it has ended
}
