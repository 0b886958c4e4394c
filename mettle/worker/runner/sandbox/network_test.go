//go:build linux

package sandbox_test

import (
	"io"
	"net"
	"os"
	"testing"

	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

const lingerArg = "sandbox-test-linger"

// linger is a command that closes a connection of its own, whose port is kept then.
func linger() error {
	l, err := net.Listen("tcp", "127.0.0.1:4711") //nolint:noctx // at once
	if err != nil {
		return err
	}
	out, err := net.Dial("tcp", l.Addr().String()) //nolint:noctx // at once
	if err != nil {
		return err
	}
	in, err := l.Accept()
	if err != nil {
		return err
	}
	if err := in.Close(); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, out)
	return err
}

// A command that had connections leaves no port behind; one that had none leaves the
// namespace to the next.
func TestRunner_portsAreFree(t *testing.T) {
	b := with(t, sandbox.Options{})
	first := tell(t, b, "readlink /proc/self/ns/net")
	if again := tell(t, b, "readlink /proc/self/ns/net"); again != first {
		t.Errorf("network namespace %s, was %s, though nobody used it", again, first)
	}
	for range 3 {
		if res := b.Do(t, "/proc/self/exe", lingerArg); res.ExitCode != 0 {
			t.Fatalf("exit code %d: %s", res.ExitCode, b.StderrText(t))
		}
		if got := tell(t, b, "cat /proc/net/tcp | wc -l; grep -c 127.0.0.1 /proc/net/fib_trie"); got[0] != '1' {
			t.Errorf("connections and addresses of the next command: %q", got)
		}
	}
	if last := tell(t, b, "readlink /proc/self/ns/net"); last == first {
		t.Error("the network namespace is the first one still")
	}
}

func lingerMain() {
	if len(os.Args) == 2 && os.Args[1] == lingerArg {
		if err := linger(); err != nil {
			println(err.Error())
			os.Exit(1)
		}
		os.Exit(0)
	}
}
