//go:build linux

package sandbox_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

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

const dialArg = "sandbox-test-dial"

// An abstract socket of the host is none of a command's business, whether or not it
// has the host's network.
func TestRunner_abstractSockets(t *testing.T) {
	name := fmt.Sprintf("@sandbox-test-%d", os.Getpid())
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", name)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for what, n := range map[string]sandbox.Network{"none": sandbox.NoNetwork, "the host's": sandbox.HostNetwork} {
		t.Run(what, func(t *testing.T) {
			version, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
			if n == sandbox.HostNetwork && (errno != 0 || version < 6) {
				t.Skip("this kernel's Landlock has no scopes")
			}
			b := with(t, sandbox.Options{Network: n})
			if res := b.Do(t, "/proc/self/exe", dialArg, name); res.ExitCode != 1 || !strings.Contains(b.StderrText(t), "connect") {
				t.Errorf("exit code %d: %q", res.ExitCode, b.StderrText(t))
			}
			if res := b.Do(t, "/proc/self/exe", dialArg); res.ExitCode != 0 {
				t.Errorf("its own: exit code %d: %q", res.ExitCode, b.StderrText(t))
			}
		})
	}
}

// dial is a command that connects to an abstract socket, its own if none is named.
func dial(names []string) error {
	if len(names) == 0 {
		names = []string{"@sandbox-test-own"}
		l, err := net.Listen("unix", names[0]) //nolint:noctx // at once
		if err != nil {
			return err
		}
		defer l.Close()
	}
	c, err := net.Dial("unix", names[0]) //nolint:noctx // at once
	if err != nil {
		return err
	}
	return c.Close()
}

func dialMain() {
	if len(os.Args) > 1 && os.Args[1] == dialArg {
		if err := dial(os.Args[2:]); err != nil {
			println(err.Error())
			os.Exit(1)
		}
		os.Exit(0)
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
