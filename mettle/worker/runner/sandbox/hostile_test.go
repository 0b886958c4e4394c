//go:build linux

package sandbox_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
	"github.com/mettle-build/mettle/mettle/worker/runner/runnertest"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

// with is a Bench with other options.
func with(t testing.TB, opts sandbox.Options) *runnertest.Bench {
	t.Helper()
	s := subject()
	s.New = func(user helper.User) (runnertest.Runner, error) {
		opts.User = user
		return sandbox.New(opts)
	}
	if opts.Root != "" {
		s.Root = opts.Root
	}
	return s.NewBench(t)
}

// tell runs a shell script that has to succeed, and returns what it printed.
func tell(t testing.TB, b *runnertest.Bench, script string) string {
	t.Helper()
	if res := b.Do(t, "sh", "-c", script); res.ExitCode != 0 {
		t.Fatalf("%s: exit code %d, stdout %q, stderr %q", script, res.ExitCode, b.StdoutText(t), b.StderrText(t))
	}
	return strings.TrimSpace(b.StdoutText(t))
}

// wantRefused runs each script, which has to fail.
func wantRefused(t testing.TB, b *runnertest.Bench, scripts ...string) {
	t.Helper()
	for _, script := range scripts {
		if res := b.Do(t, "sh", "-c", script); res.ExitCode == 0 {
			t.Errorf("%s: succeeded with stdout %q", script, b.StdoutText(t))
		}
	}
}

func TestRunner_hidesAndProtectsTheHost(t *testing.T) {
	t.Run("own user", func(t *testing.T) { hidesAndProtectsTheHost(t, with) })
	t.Run("worker's user", func(t *testing.T) { hidesAndProtectsTheHost(t, asWorker) })
}

// asWorker is a Bench whose commands run as the user of the worker, root say.
func asWorker(t testing.TB, opts sandbox.Options) *runnertest.Bench {
	t.Helper()
	s := subject()
	s.New = func(helper.User) (runnertest.Runner, error) { return sandbox.New(opts) }
	return s.NewBench(t)
}

func hidesAndProtectsTheHost(t *testing.T, with func(testing.TB, sandbox.Options) *runnertest.Bench) {
	// Neither below /tmp, which is hidden anyway, nor writable for everyone.
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	b := with(t, sandbox.Options{Hide: []string{"/etc/hostname", "/usr/share", "/no/such/path"}})
	wantRefused(t, b,
		"cat "+secret, "cat /etc/shadow", "cat /etc/hostname", "chmod 644 /etc/hostname && echo x > /etc/hostname", "ls /usr/share/*", "ls /root/* /home/*", "ls /run/*", "ls /.host/*", "cat /proc/kcore",
		"touch /etc/x", "touch /usr/x", "touch /x", "touch /.host/x", "touch /dev/x", "touch /var/x", "touch /sys/x", "echo 1 > /proc/sys/vm/drop_caches",
		"echo x >> /etc/passwd", "rm /etc/passwd", "chmod 777 /etc", "ln /etc/passwd x", "echo b > /proc/sysrq-trigger",
		"mkdir m; mount -t tmpfs none m", "mount -o remount,rw /etc", "umount /.host", "umount /build", "unshare -r true", "unshare -m true", "chroot / true",
		"hostname other", "mknod d b 8 0", "mknod d c 1 3", "ls /proc/1/root/", "for f in /proc/1/fd/*; do ls $f/. && exit; readlink $f && exit; done; exit 1", "cat /proc/1/environ | grep .", "cat /proc/1/mem",
		"ls /dev/sda /dev/vda /dev/mem /dev/kmsg",
	)
	if got := tell(t, b, "grep -E 'Cap(Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs' /proc/self/status | cut -f2 | sort -u"); got != "0000000000000000\n1" {
		t.Errorf("capabilities and no_new_privs %q", got)
	}
}

// A command of the worker's user, root say, owns the devices that it sees: they are the
// host's.
func TestRunner_changesNoDevice(t *testing.T) {
	b := asWorker(t, sandbox.Options{})
	for _, name := range []string{"full", "null", "zero", "urandom", "tty"} {
		mode, err := os.Stat("/dev/" + name)
		if err != nil {
			t.Fatal(err)
		}
		// That which it has: the host is to be as it was if this fails.
		wantRefused(t, b, fmt.Sprintf("chmod %o /dev/%s", mode.Mode().Perm(), name))
	}
	tell(t, b, "echo x > /dev/null; head -c 4 /dev/zero; exec 3<>/dev/urandom")
}

func TestRunner_ownDevicesTmpAndName(t *testing.T) {
	b := with(t, sandbox.Options{Hostname: "builder"})
	if got := tell(t, b, "uname -n; pwd; ls -A /tmp /dev/shm | tr '\\n' ' '; head -c 4 /dev/zero | wc -c; head -c 4 /dev/urandom | wc -c; echo x > /dev/null; ls /dev | tr '\\n' ' '"); got !=
		"builder\n/build\n/dev/shm:  /tmp: 4\n4\nfd full null ptmx pts random shm stderr stdin stdout tty urandom zero" {
		t.Errorf("name, directory, files and devices %q", got)
	}
	wantRefused(t, b, "echo x > /dev/full")
	if got := tell(t, b, "ls /proc > list; grep -c '^[0-9]*$' list; readlink /proc/1/cwd || echo hidden"); got != "2\nhidden" {
		t.Errorf("processes %q, want the shell and ls, and not the helper", got)
	}
	if name, err := os.Hostname(); err != nil || name == "builder" {
		t.Errorf("the host's name is %q now, %v", name, err)
	}
}

func TestRunner_nextCommandSeesNothingOfTheLast(t *testing.T) {
	b := with(t, sandbox.Options{})
	for name, script := range map[string]string{
		"/tmp":         "echo x > /tmp/x; mkdir -p /tmp/.y/z",
		"/var/tmp":     "echo x > /var/tmp/x",
		"/dev/shm":     "echo x > /dev/shm/x",
		"hidden file":  "echo x > /tmp/.x",
		"mode of /tmp": "chmod 700 /tmp 2>/dev/null; true",
	} {
		t.Run(name, func(t *testing.T) {
			tell(t, b, script)
			if got := tell(t, b, "ls -A /tmp /var/tmp /dev/shm; stat -c %a /tmp /var/tmp /dev/shm"); got != "/dev/shm:\n\n/tmp:\n\n/var/tmp:\n1777\n1777\n1777" {
				t.Errorf("afterwards %q", got)
			}
		})
	}
	t.Run("IPC", func(t *testing.T) {
		first := tell(t, b, "readlink /proc/self/ns/ipc; ipcmk -M 4096 >/dev/null; wc -l < /proc/sysvipc/shm")
		if got := tell(t, b, "wc -l < /proc/sysvipc/shm"); got != "1" {
			t.Errorf("%s lines in /proc/sysvipc/shm, want its head only; the first command had %q", got, first)
		}
	})
}

func TestRunner_newRoot(t *testing.T) {
	b := with(t, sandbox.Options{Root: "/work-of/action"})
	for i := range 3 {
		if err := os.Mkdir(filepath.Join(b.Dir, "sub"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(b.Dir, "sub", "in"), fmt.Appendf(nil, "%d", i), 0o644); err != nil {
			t.Fatal(err)
		}
		b.Spec.Dir = filepath.Join(b.Dir, "sub")
		if got, want := tell(t, b, "pwd; cat in; echo $(cat in) > ../out"), fmt.Sprintf("/work-of/action/sub\n%d", i); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		if data, err := os.ReadFile(filepath.Join(b.Dir, "out")); err != nil || string(data) != fmt.Sprintln(i) {
			t.Errorf("the host sees %q, %v", data, err)
		}
		if err := os.Rename(b.Dir, fmt.Sprint(b.Dir, i)); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(b.Dir, 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(b.Dir, 0o777); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRunner_directoryOutsideTheRoot(t *testing.T) {
	b := with(t, sandbox.Options{})
	b.Spec.Args = []string{"true"}
	b.Spec.Dir = filepath.Dir(b.Dir)
	if _, err := b.Run(t.Context(), b.Spec); err == nil || !strings.Contains(err.Error(), "is not in the root") {
		t.Errorf("Run: %v", err)
	}
	b.Spec.Dir = b.Dir
	tell(t, b, "true")
}

func TestRunner_network(t *testing.T) {
	lc := net.ListenConfig{}
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	connect := "bash -c 'exec 3<>/dev/tcp/127.0.0.1/" + port + "'"
	b := with(t, sandbox.Options{})
	wantRefused(t, b, connect)
	if got := tell(t, b, "cat /proc/net/dev | tail -n +3 | cut -d: -f1 | tr -d ' '; grep -c '127.0.0.1' /proc/net/fib_trie"); !strings.HasPrefix(got, "lo\n") {
		t.Errorf("interfaces and addresses %q, want lo only, up", got)
	}
	tell(t, with(t, sandbox.Options{Network: sandbox.HostNetwork}), connect)
}

func TestRunner_helperCannotBeHarmed(t *testing.T) {
	for name, b := range map[string]*runnertest.Bench{"own user": with(t, sandbox.Options{}), "worker's user": asWorker(t, sandbox.Options{})} {
		t.Run(name, func(t *testing.T) {
			first := tell(t, b, "readlink /proc/self/ns/pid")
			b.Do(t, "sh", "-c", "for s in $(seq 1 64); do kill -$s 1; done; kill -9 -1; kill -9 $PPID")
			if got := tell(t, b, "readlink /proc/self/ns/pid"); got != first {
				t.Errorf("PID namespace %s, was %s: the helper was replaced", got, first)
			}
		})
	}
}

// Who runs a program that the filter kills hears what to do.
func TestRunner_killedByTheFilter(t *testing.T) {
	const script = "kill -SYS $$" // as the kernel does
	if res := with(t, sandbox.Options{}).Do(t, "sh", "-c", script); len(res.Notes) != 1 || !strings.Contains(res.Notes[0], "--sandbox_syscalls=all") {
		t.Errorf("exit code %d, notes %q", res.ExitCode, res.Notes)
	}
	b := with(t, sandbox.Options{Syscalls: sandbox.AllSyscalls})
	if res := b.Do(t, "sh", "-c", script); len(res.Notes) != 0 {
		t.Errorf("without a filter: notes %q", res.Notes)
	}
	if got := tell(t, b, "grep -w Seccomp /proc/self/status"); got != "Seccomp:\t0" {
		t.Errorf("without a filter: %q", got)
	}
	if got := tell(t, with(t, sandbox.Options{}), "grep -w Seccomp /proc/self/status"); got != "Seccomp:\t2" {
		t.Errorf("with a filter: %q", got)
	}
}

// A fork bomb is killed with all that it made. How much that is, the test bounds
// itself, or it would harm others on this machine.
func TestRunner_forkBomb(t *testing.T) {
	b := with(t, sandbox.Options{})
	b.Spec.Args = []string{"bash", "-c", `ulimit -u 300 || exit 9; echo $$ > pids; printf '#!/bin/sh\ni=0; while [ $i -lt 3 ]; do ./b.sh & i=$((i+1)); done; sleep 1000\n' > b.sh; chmod +x b.sh; ./b.sh & sleep 0.2`}
	if res, err := b.Run(t.Context(), b.Spec); err != nil || res.ExitCode == 9 {
		t.Errorf("Run: exit code %d, %v", res.ExitCode, err)
	}
	b.WantDead(t)
	tell(t, b, "true")
}

func TestNew_refuses(t *testing.T) {
	for name, opts := range map[string]sandbox.Options{
		"relative root":        {Root: "build"},
		"host as root":         {Root: "/"},
		"root in /proc":        {Root: "/proc/x"},
		"unclean root":         {Root: "/a/../b"},
		"relative hidden path": {Hide: []string{"x"}},
		"all hidden":           {Hide: []string{"/"}},
		"negative size":        {TmpBytes: -1},
		"root not there":       {Root: "/usr/no-such-directory/x"},
		"root is hidden":       {Root: "/usr/lib", Hide: []string{"/usr"}},
	} {
		t.Run(name, func(t *testing.T) {
			// A worker that is to isolate actions where it can would go on without, by any other error.
			if r, err := sandbox.New(opts); err == nil {
				t.Errorf("New succeeded: %v", r.Close())
			} else if !errors.Is(err, sandbox.ErrOptions) {
				t.Errorf("%v, want one of the options", err)
			}
			if _, err := os.Stat("/usr/no-such-directory"); err == nil {
				t.Error("it made a directory of the host")
			}
		})
	}
}

// A command finds nothing of the host's mounts but those of the directories that it
// sees, and nothing of what the helper was told.
func TestRunner_tellsNothingOfTheWorker(t *testing.T) {
	t.Setenv("WORKER_SECRET", "a-worker's-secret")
	hidden := t.TempDir() // behind what is hidden anyway
	for name, b := range map[string]*runnertest.Bench{
		"own user":      with(t, sandbox.Options{Hide: []string{hidden}}),
		"worker's user": asWorker(t, sandbox.Options{Hide: []string{hidden}}),
	} {
		t.Run(name, func(t *testing.T) {
			base := filepath.Dir(b.Dir)
			// The kernel says of the root where it lies on its file system.
			all := tell(t, b, "cat /proc/self/mountinfo /proc/self/mounts | grep -v ' /build '; cat /proc/1/cmdline 2>/dev/null; cat /proc/1/environ /proc/1/mountinfo /proc/1/task/*/mountinfo 2>/dev/null; ls -A /")
			for _, secret := range []string{base, hidden, ".host", " /host", "worker's-secret", "\n.hidden", "sandbox "} {
				if strings.Contains(all, secret) {
					t.Errorf("%q is in %s", secret, all)
				}
			}
			for line := range strings.Lines(all) {
				f := strings.Fields(line)
				if len(f) < 7 || !strings.Contains(line, " - ") {
					continue
				}
				if _, err := os.Stat(f[4]); err != nil && f[4] != "/build" {
					t.Errorf("mounted at %s, which this machine does not have", f[4])
				}
			}
		})
	}
}
