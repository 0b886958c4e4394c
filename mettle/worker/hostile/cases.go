//go:build linux

package hostile

import (
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
)

// google.rpc.Code, without gRPC.
const (
	invalidArgument    = 3
	resourceExhausted  = 8
	failedPrecondition = 9
	internal           = 13
)

// tampered is what an action ends with that changed an input which is also the
// store's blob.
func tampered() Outcome { return fails(invalidArgument, "an input was changed") }

func reading() []Case {
	return []Case{
		{Name: "reads /etc/shadow", Script: `head -c 1 /etc/shadow`, Want: everywhere(refused())},
		{Name: "reads a secret file of the worker", Script: `cat "$SECRET"`, Want: butPlainBare(refused(), possible())},
		{Name: "lists the store", Script: `ls "$STORE" && ls "$STORE"/*`, Want: butPlainBare(refused(), possible())},
		{Name: "reads a blob of the store by its path", Script: `cat "$BLOB"`, Want: butPlainBare(refused(), possible())},
		{Name: "lists the worker's directory", Script: `ls "$WORK"`, Want: butPlainBare(refused(), possible())},
		{Name: "lists the slots' directories", Script: `ls "$WORK/slot0" || ls "$WORK/slot1"`, Want: butPlainBare(refused(), possible())},
		{Name: "reads the worker's environment", Script: `cat "/proc/$WORKER/environ"`, Want: butPlainBare(refused(), possible())},
		{Name: "reads the worker's memory", Attack: "read-memory", Want: butPlainBare(refused(), asUser())},
		{Name: "enters the worker's root directory", Script: `ls "/proc/$WORKER/root/"`, Want: butPlainBare(refused(), possible())},
		{Name: "lists what the worker has open", Script: `ls "/proc/$WORKER/fd/"`, Want: butPlainBare(refused(), possible())},
		{Name: "reads the helper's environment", Script: `cat "/proc/$PPID/environ" | grep -q .`, Want: butPlainBare(refused(), asUser())},
		{Name: "reads the machine's memory", Script: `head -c 1 /dev/mem || head -c 1 /proc/kcore || head -c 1 /dev/kmem`, Want: everywhere(refused())},
		{Name: "reads the kernel's log by /dev/kmsg", Script: `exec 3</dev/kmsg`, Want: inside(refused(), asUser())},
		{Name: "reads a disk", Script: `for d in /dev/sda /dev/vda /dev/nvme0n1; do if [ -e $d ]; then head -c 1 $d; exit; fi; done; exit 1`, Want: everywhere(refused())},
	}
}

func inputs() []Case {
	return []Case{
		{Name: "writes to an input", Script: `echo evil > big`, Want: everywhere(refused())},
		{Name: "appends to an input", Script: `echo evil >> big`, Want: everywhere(refused())},
		{Name: "truncates an input", Script: `truncate -s 0 big`, Want: everywhere(refused())},
		{Name: "changes the mode of an input", Script: `chmod 777 big`, Want: asRoot(refused(), tampered())},
		{Name: "makes an input executable", Script: `chmod 555 big`, Want: asRoot(refused(), tampered())},
		{Name: "changes an input after chmod", Script: `chmod 644 big; echo evil > big`, Want: asRoot(refused(), tampered())},
		{Name: "changes a program after chmod", Script: `chmod 755 tool; echo evil >> tool`, Want: asRoot(refused(), tampered())},
		{Name: "changes an input in a directory below", Script: `chmod 644 dir/big; echo evil > dir/big`, Want: asRoot(refused(), tampered())},
		{Name: "sets the times of an input", Attack: "utimes", Want: asRoot(refused(), tampered())},
		{Name: "writes to an input, and sets mode and time back", Attack: "cover", Want: asRoot(refused(), tampered())},
		{Name: "changes an input by a process that stays", Script: `(setsid sh -c 'chmod 644 big; echo evil > big; touch up; sleep 1000' &); until [ -e up ]; do sleep 0.01; done; grep -q evil big`, Want: asRoot(refused(), tampered())},
		{Name: "gives an input to another user", Script: `chown 1 big`, Want: everywhere(refused())},
		{Name: "sets an attribute of an input", Attack: "xattr", Want: everywhere(refused())},
		{Name: "sets a flag of an input", Attack: "flags", Want: everywhere(refused())},
		{Name: "writes to an input by /proc/self/fd", Attack: "reopen", Want: everywhere(refused())},
		{Name: "writes to an input by a shared mapping", Attack: "mmap", Want: everywhere(refused())},
		{Name: "writes to an input behind a symlink", Script: `ln -s big l; echo evil > l`, Want: everywhere(refused())},
		{Name: "writes to an input by another name", Script: `ln big l || ln dir/big l; echo evil > l`, Want: everywhere(refused())},
		{Name: "renames a file over an input", Script: `echo evil > n; mv -f n big`, Want: everywhere(harmless())},
		{Name: "replaces an input", Script: `rm -f big; echo evil > big`, Want: everywhere(harmless())},
		{Name: "replaces a directory by a symlink", Script: `mv dir away; ln -s away dir; rm -f dir/big; echo evil > dir/big`, Want: everywhere(harmless())},
		{Name: "replaces a directory by a symlink to the host", Script: `rm -rf dir; ln -s "$OPEN" dir; echo evil > dir/$LEFT`, Want: inside(refused(), stays(partShared))},
		{Name: "makes a link to an input elsewhere on the host", Script: `ln big "$OPEN/$LEFT"`, Want: each(refused(), refused(), asUser(), stays(partShared))},
		{Name: "makes a link to an input in /tmp", Script: `ln big "/tmp/$LEFT"`, Want: inside(refused(), asUser())},
		{Name: "returns a link to an input", Script: `ln big out || cp big out`, Outputs: []string{"out"}, Want: everywhere(harmless())},
		{Name: "returns an input itself", Script: `true`, Outputs: []string{"big", "tool", "dir"}, Want: everywhere(harmless())},
		{Name: "returns an input under another name", Script: `mv big out; mv tool out2`, Outputs: []string{"out", "out2"}, Want: everywhere(harmless())},
		{Name: "locks an input, and stays", Attack: "lock", Want: everywhere(harmless())},
		{Name: "watches an input", Attack: "watch", Want: everywhere(harmless())},
	}
}

func host() []Case {
	return []Case{
		{Name: "writes to a file of the worker", Script: `echo evil >> "$SECRET"`, Want: butPlainBare(refused(), possible())},
		{Name: "writes to a system file", Script: `echo >> /etc/passwd`, Want: everywhere(refused())},
		{Name: "replaces a system program", Script: `touch /usr/bin/$LEFT || touch /bin/$LEFT || touch /usr/lib/$LEFT`, Want: everywhere(refused())},
		{Name: "writes to a directory that everybody may write to", Script: `echo evil > "$OPEN/$LEFT"`, Want: inside(refused(), stays(partShared))},
		{Name: "leaves a file in /tmp", Script: `echo evil > "/tmp/$LEFT"`, Want: inside(harmless(), stays(partShared))},
		{Name: "leaves a file in /var/tmp", Script: `echo evil > "/var/tmp/$LEFT"`, Want: inside(harmless(), stays(partShared))},
		{Name: "leaves a file in /dev/shm", Script: `echo evil > "/dev/shm/$LEFT"`, Want: inside(harmless(), stays(partShared))},
		{Name: "writes to a blob of the store", Script: `echo evil >> "$BLOB"`, Want: everywhere(refused())},
		{Name: "removes a blob of the store", Script: `rm -f "$BLOB"; [ ! -e "$BLOB" ] && [ -d "$STORE" ]`, Want: butPlainBare(refused(), untried())},
		{Name: "writes to /proc/sys", Script: `exec 3>/proc/sys/kernel/core_pattern`, Want: everywhere(refused())},
		{Name: "writes to /sys", Script: `exec 3>/sys/kernel/uevent_helper || exec 3>/sys/power/state || exec 3>/sys/kernel/profiling`, Want: everywhere(refused())},
		{Name: "writes to /proc/sysrq-trigger", Script: `exec 3>/proc/sysrq-trigger`, Want: everywhere(refused())},
		{Name: "writes to /dev/kmsg", Script: `exec 3>/dev/kmsg`, Want: inside(refused(), asUser())},
		{Name: "leaves its control group", Script: `for f in /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/*/cgroup.procs /sys/fs/cgroup/*/tasks; do if [ -e $f ]; then echo $$ > $f; exit; fi; done; exit 1`, Want: inside(refused(), asUser())},
		{Name: "makes a control group", Script: `mkdir /sys/fs/cgroup/$LEFT || mkdir /sys/fs/cgroup/memory/$LEFT || mkdir /sys/fs/cgroup/unified/$LEFT`, Want: inside(refused(), asUser())},
		{Name: "sets the host's name", Attack: "host-name", Want: everywhere(refused())},
		{Name: "sets the clock", Attack: "clock", Want: everywhere(refused())},
		{Name: "reboots", Attack: "reboot", Want: everywhere(refused())},
		{Name: "types at the worker's terminal", Attack: "tiocsti", Want: everywhere(refused())},
	}
}

func processes() []Case {
	return []Case{
		{Name: "leaves a daemon", Script: `(setsid sh -c '(sleep 1000 &) ; touch up; exec sleep 1000' &); until [ -e up ]; do sleep 0.01; done`, Want: everywhere(harmless())},
		{Name: "leaves a daemon that ignores signals", Script: `(trap '' TERM HUP INT QUIT; setsid sh -c 'touch up; while :; do sleep 0.1; done' &); until [ -e up ]; do sleep 0.01; done`, Want: everywhere(harmless())},
		{Name: "leaves a daemon that holds its output", Script: `(setsid sh -c 'touch up; while :; do echo evil; sleep 0.01; done' &); until [ -e up ]; do sleep 0.01; done`, Want: everywhere(harmless())},
		{Name: "leaves a daemon that changes an output", Script: `echo good > out; (setsid sh -c 'touch up; while :; do echo evil >> out; done' &); until [ -e up ]; do sleep 0.01; done`, Outputs: []string{"out"}, Want: everywhere(harmless())},
		{Name: "leaves a daemon that holds its directory", Script: `(cd dir; setsid sh -c 'touch ../up; exec sleep 1000' < big &); until [ -e up ]; do sleep 0.01; done`, Want: everywhere(harmless())},
		{Name: "leaves a stopped process", Script: `sleep 1000 & kill -STOP $!`, Want: everywhere(harmless())},
		{Name: "leaves a process that waits in the kernel", Attack: "vfork", Want: everywhere(harmless())},
		{Name: "leaves processes without parents", Attack: "orphans", Want: everywhere(harmless())},
		{Name: "leaves a process that forks and dies all the time", Script: `printf '#!/bin/sh\n[ -e stop ] || ./c.sh &\n' > c.sh; chmod +x c.sh; ./c.sh`, Want: everywhere(harmless())},
		{Name: "leaves a process that respawns its child", Script: `setsid sh -c 'trap "" TERM; touch up; while :; do sleep 1000; done' & until [ -e up ]; do sleep 0.01; done`, Want: everywhere(harmless())},
		{Name: "forks without end", Attack: "fork-bomb", Want: everywhere(harmless())},
		{Name: "kills all that it can", Command: arguments("/bin/sh", "-c", "sleep 1000 & (kill -9 -1)"), Want: butPlainBare(exits(137), untried())},
		{Name: "signals the worker", Script: `kill -0 "$WORKER"`, Want: butPlainBare(refused(), possible())},
		{Name: "kills the helper", Script: `kill -9 $PPID`, Want: each(refused(), harmless(), refused(), fails(internal, "wait for the helper"))},
		{Name: "stops the helper", Script: `kill -STOP $PPID`, Want: each(refused(), harmless(), refused(), untried())},
		{Name: "traces the worker", Attack: "trace", Want: butPlainBare(refused(), asUser())},
		{Name: "traces the helper", Attack: "trace-parent", Want: butPlainBare(refused(), asUser())},
		{Name: "is spared when memory is short", Script: `echo -1000 > /proc/self/oom_score_adj`, Want: everywhere(refused())},
		{Name: "spares the helper no memory", Script: `echo 1000 > /proc/$PPID/oom_score_adj`, Want: butPlainBare(refused(), asUser())},
		{Name: "raises its priority", Attack: "nice", Want: everywhere(refused())},
		{Name: "runs in real time", Attack: "realtime", Want: everywhere(refused())},
		{Name: "raises its limits", Attack: "limits", Want: everywhere(refused())},
		{Name: "becomes root", Attack: "root", Want: everywhere(refused())},
		{Name: "joins a group", Attack: "groups", Want: everywhere(refused())},
		{Name: "makes a program that runs as its owner", Script: `cp /bin/sh out; chmod 4755 out; ./out -c 'test $(id -u) = '$(id -u)`, Outputs: []string{"out"}, Want: everywhere(harmless())},
		{Name: "crashes", Script: `ulimit -c unlimited; kill -SEGV $$`, Want: everywhere(refused())},
		{Name: "ends by a signal", Command: arguments("sh", "-c", "kill -SEGV $$"), Want: everywhere(exits(139))},
		{Name: "has an argument of 4 MB", Command: arguments("true", strings.Repeat("x", 4<<20)), Want: everywhere(exits(126))},
		{Name: "is a script without an interpreter", Command: arguments("./orphan"), Want: everywhere(exits(127))},
		{Name: "is a directory", Command: arguments("./dir"), Want: everywhere(exits(126))},
	}
}

func arguments(args ...string) func(*repb.Command) {
	return func(c *repb.Command) { c.Arguments = args }
}

func kernel() []Case {
	return []Case{
		{Name: "mounts", Attack: "mount", Want: everywhere(refused())},
		{Name: "binds the host's root", Attack: "bind", Want: everywhere(refused())},
		{Name: "makes the host writable", Attack: "remount", Want: everywhere(refused())},
		{Name: "unmounts", Attack: "umount", Want: everywhere(refused())},
		{Name: "changes its root", Attack: "pivot", Want: everywhere(refused())},
		{Name: "calls chroot", Attack: "chroot", Want: everywhere(refused())},
		{Name: "makes a user namespace", Attack: "unshare-user", Want: inside(refused(), asUser())},
		{Name: "makes a mount namespace", Attack: "unshare-mount", Want: everywhere(refused())},
		{Name: "makes a user namespace by a program", Script: `command -v unshare >/dev/null || exit 1; unshare -r true`, Want: inside(refused(), asUser())},
		{Name: "enters other namespaces", Attack: "setns", Want: everywhere(refused())},
		{Name: "makes a block device", Attack: "block-device", Want: everywhere(refused())},
		{Name: "makes a character device", Attack: "character-device", Want: everywhere(refused())},
		{Name: "loads a module", Attack: "module", Want: everywhere(refused())},
		{Name: "loads a BPF program", Attack: "bpf", Want: inside(refused(), asUser())},
		{Name: "watches all of a processor", Attack: "perf", Want: inside(refused(), asUser())},
		{Name: "uses io_uring", Attack: "uring", Want: inside(refused(), asUser())},
		{Name: "reads the kernel's log", Attack: "kernel-log", Want: inside(refused(), asUser())},
	}
}

func network() []Case {
	return []Case{
		{Name: "connects to the worker", Attack: "connect", Want: inside(refused(), possible())},
		{Name: "connects to a unix socket of the worker", Attack: "connect-unix", Want: butPlainBare(refused(), possible())},
		{Name: "connects to an abstract socket of the worker", Attack: "connect-abstract", Want: inside(refused(), possible())},
		{Name: "looks for 169.254.169.254", Attack: "metadata", Want: inside(refused(), asUser())},
		{Name: "opens a packet socket", Attack: "packet", Want: everywhere(refused())},
		{Name: "opens a raw socket", Attack: "raw", Want: everywhere(refused())},
		{Name: "opens a socket to the hypervisor", Attack: "vsock", Want: inside(refused(), asUser())},
		{Name: "leaves listeners", Attack: "listen", Want: everywhere(harmless())},
	}
}

func leftovers() []Case {
	return []Case{
		{Name: "leaves SysV objects", Attack: "sysv", Want: inside(harmless(), stays(partSysV))},
		{Name: "leaves a message queue", Attack: "queue", Want: inside(harmless(), stays(partQueues))},
		{Name: "leaves a key in the session keyring", Attack: "session-key", Want: inside(refused(), asUser())},
		{Name: "leaves a key in the user's keyring", Attack: "user-key", Want: inside(refused(), stays(partUserKeys))},
		{Name: "leaves 20,000 files", Attack: "files", Want: everywhere(harmless())},
		{Name: "leaves 1,000,000 files", Attack: "million", Want: everywhere(harmless()), Large: true},
		{Name: "leaves directories 3,000 levels deep", Attack: "deep", Want: everywhere(harmless())},
		{Name: "leaves directories 20,000 levels deep", Attack: "deepest", Want: everywhere(harmless()), Large: true},
		{Name: "leaves directories whose path has 50,000 bytes", Attack: "deep-long", Want: everywhere(harmless())},
		{Name: "leaves odd names", Attack: "names", Want: everywhere(harmless())},
		{Name: "leaves directories that can't be read", Script: `mkdir -p a/b/c; touch a/b/c/d a/b/e; chmod 0 a/b/c a/b a`, Want: everywhere(harmless())},
		{Name: "leaves directories that can't be written to", Script: `mkdir -p a/b/c; touch a/b/c/d a/b/e; chmod 500 a/b/c a/b a .`, Want: everywhere(harmless())},
		{Name: "leaves its own directory closed", Script: `chmod 0 .`, Want: everywhere(harmless())},
		{Name: "leaves sticky and setgid directories", Script: `mkdir a; chmod 7777 a .`, Want: everywhere(harmless())},
		{Name: "leaves a FIFO", Script: `mkfifo a`, Want: everywhere(harmless())},
		{Name: "leaves symlinks", Script: `ln -s / a; ln -s loop loop; ln -s "$OPEN" b; rm -rf dir; ln -s "$OPEN" dir`, Want: everywhere(harmless())},
		{Name: "leaves a sparse file of 1 TB", Script: `truncate -s 1T a`, Want: everywhere(harmless())},
	}
}

func slot() []Case {
	return []Case{
		{Name: "removes all of its directory", Script: `rm -rf -- * .[!.]* 2>/dev/null; ls -A | grep -q . && exit 1; exit 0`, Outputs: []string{"out"}, Want: everywhere(harmless())},
		{Name: "moves its directory away", Script: `mv "$PWD" "$PWD.away"`, Outputs: []string{"out"}, Want: butPlainBare(refused(), gone())},
		{Name: "replaces its directory by a symlink", Script: `mv "$PWD" "$PWD.away"; ln -s "$OPEN" "$PWD"`, Outputs: []string{"out"}, Want: butPlainBare(refused(), gone())},
		{Name: "replaces its directory by a file", Script: `mv "$PWD" "$PWD.away"; echo > "$PWD"`, Outputs: []string{"out"}, Want: butPlainBare(refused(), gone())},
		{Name: "replaces its slot's directory by a symlink", Script: `s=$(dirname "$PWD"); mv "$s" "$s.away"; ln -s "$OPEN" "$s"`, Outputs: []string{"out"}, Want: butPlainBare(refused(), gone())},
		{Name: "moves its slot's directory away, and makes another", Script: `s=$(dirname "$PWD"); mv "$s" "$s.away"; mkdir -p "$s/root"; echo evil > "$s/root/evil"`, Outputs: []string{"out"}, Want: butPlainBare(refused(), harmless())},
		{Name: "removes its slot's directory", Script: `cd /; rm -rf "$(dirname "$OLDPWD")"; [ ! -e "$OLDPWD" ]`, Outputs: []string{"out"}, Want: butPlainBare(refused(), gone())},
		{Name: "renames its working directory", Script: `mv ../wd ../other; echo x > out`, Outputs: []string{"out"}, Command: workingDirectory, Want: everywhere(harmless())},
		{Name: "removes its working directory", Script: `rm -rf ../wd`, Outputs: []string{"out"}, Command: workingDirectory, Want: everywhere(harmless())},
		{Name: "replaces its working directory by a symlink", Script: `rm -rf ../wd; ln -s "$OPEN" ../wd`, Outputs: []string{"out"}, Command: workingDirectory, Want: everywhere(noted("leads out of the input root"))},
		{Name: "prints without end", Script: `cat /dev/zero`, Want: everywhere(tooMuch())},
		{Name: "prints without end to stderr", Script: `cat /dev/zero >&2`, Want: everywhere(tooMuch())},
		{Name: "makes stdout 10 GB large", Script: `truncate -s 10G /proc/self/fd/1`, Want: everywhere(tooMuch())},
		{Name: "makes stdout unreadable", Script: `echo out; chmod 0 /proc/self/fd/1`, Want: everywhere(harmless()), Check: stdoutIs("out\n")},
		{Name: "makes stdout a program of its owner", Script: `echo out; chmod 6777 /proc/self/fd/1`, Want: everywhere(harmless()), Check: stdoutIs("out\n")},
		{Name: "empties stdout", Script: `echo out; truncate -s 0 /proc/self/fd/1`, Want: everywhere(harmless())},
		{Name: "sets a time of the year 2100", Script: `touch -d 2100-01-01 . dir /proc/self/fd/1; echo out`, Want: everywhere(harmless()), Check: stdoutIs("out\n")},
		{Name: "returns its stdout", Script: `echo out; ln -s /proc/self/fd/1 out`, Outputs: []string{"out"}, Want: everywhere(harmless())},
	}
}

// gone is the end of an action whose directory is not there any more.
func gone() Outcome { return fails(failedPrecondition, "removed or replaced its input root") }

func tooMuch() Outcome { return fails(invalidArgument, "printed too much") }

func workingDirectory(c *repb.Command) { c.WorkingDirectory = "wd" }
