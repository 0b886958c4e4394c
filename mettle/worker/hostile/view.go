//go:build linux

package hostile

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// View is what an action sees of its place, by part: equal for two actions of the
// same slot with the same inputs, whatever ran between them.
type View map[string]string

// The parts of a View that an attack may change for the next action in some way
// of running.
const (
	partSysV      = "SysV IPC"
	partQueues    = "message queues"
	partUserKeys  = "user keyring"
	partSession   = "session keyring"
	partShared    = "shared directories"
	partProcesses = "processes"
)

const viewName = "view"

// ViewArguments are those of a Command that prints a View, for ParseView.
func ViewArguments() []string { return []string{"./" + ProgramName, viewName} }

// ParseView reads what that Command has printed.
func ParseView(stdout []byte) (View, error) {
	v := View{}
	if err := json.Unmarshal(stdout, &v); err != nil {
		return nil, fmt.Errorf("view: %w", err)
	}
	return v, nil
}

func printView(w io.Writer) error {
	v := View{
		"inputs":          tree("."),
		partShared:        shared("/tmp") + shared("/var/tmp") + shared("/dev/shm") + shared(os.Getenv(openVariable)),
		partProcesses:     processesOfUser(),
		partSysV:          ownSysV(),
		partQueues:        queueOf(),
		partUserKeys:      keysOf(unix.KEY_SPEC_USER_KEYRING),
		"environment":     strings.Join(os.Environ(), "\n"),
		"limits":          read("/proc/self/limits"),
		"oom_score_adj":   read("/proc/self/oom_score_adj"),
		"control group":   read("/proc/self/cgroup"),
		"status":          grep("/proc/self/status", "Umask", "SigBlk", "SigIgn", "Cap", "NoNewPrivs", "Seccomp", "Uid", "Gid", "Groups"),
		"mounts":          mounts(),
		"sockets":         sockets(),
		"descriptors":     descriptors(),
		"nice":            nice(),
		"hostname":        read("/proc/sys/kernel/hostname"),
		"abstract socket": grep("/proc/net/unix", leftName()+"\n"),
	}
	if isolated() { // elsewhere it is up to who started the worker
		v[partSession] = keysOf(unix.KEY_SPEC_SESSION_KEYRING)
	}
	if wd, err := os.Getwd(); err == nil {
		v["directory"] = filepath.Base(wd)
	}
	return json.NewEncoder(w).Encode(v)
}

func read(file string) string {
	data, err := os.ReadFile(file) //nolint:gosec // the names are ours
	if err != nil {
		return err.Error()
	}
	return string(data)
}

// grep is the lines of the file in which one of the words is.
func grep(file string, words ...string) string {
	var lines []string
	for line := range strings.Lines(read(file)) {
		if slices.ContainsFunc(words, func(w string) bool { return strings.Contains(line, w) }) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

// isolated reports whether this process is in a PID namespace of the sandbox: its
// parent is the helper, which is the first process there.
func isolated() bool { return os.Getppid() == 1 }

// shared lists a directory that many use: of one of the host's, what is named after
// this test.
func shared(dir string) string {
	if isolated() {
		return tree(dir)
	}
	var all strings.Builder
	names, _ := filepath.Glob(filepath.Join(dir, leftName()+"*"))
	for _, name := range names {
		all.WriteString(tree(name))
	}
	return all.String()
}

// tree lists dir and all below it, for files with their bytes.
func tree(dir string) string {
	var b strings.Builder
	_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		if err != nil {
			b.WriteString(err.Error() + "\n")
			return nil
		}
		fmt.Fprintf(&b, "%s %o %s", path, st.Mode, attributesOf(path))
		switch {
		case e.Name() == ProgramName:
			fmt.Fprintf(&b, " %d", st.Size) // it runs
		case e.Type().IsRegular():
			fmt.Fprintf(&b, " %x", sha256.Sum256([]byte(read(path))))
		case e.Type()&fs.ModeSymlink != 0:
			target, _ := os.Readlink(path)
			b.WriteString(" -> " + target)
		}
		b.WriteByte('\n')
		return nil
	})
	return b.String()
}

// attributesOf are the extended attributes that a user can set.
func attributesOf(path string) string {
	var names [4096]byte
	n, err := unix.Llistxattr(path, names[:])
	if err != nil || n <= 0 {
		return ""
	}
	var own []string
	for name := range bytes.SplitSeq(names[:n], []byte{0}) {
		if bytes.HasPrefix(name, []byte("user.")) || bytes.HasPrefix(name, []byte("system.")) {
			own = append(own, string(name))
		}
	}
	return strings.Join(own, ",")
}

// processesOfUser counts the processes of the user that are not this one or its
// forebears: none, where the user is the slot's own.
func processesOfUser() string {
	forebears := map[int]bool{os.Getpid(): true}
	for pid := os.Getppid(); pid > 0; {
		forebears[pid] = true
		fields := strings.Fields(afterName(read(fmt.Sprintf("/proc/%d/stat", pid))))
		if len(fields) < 2 {
			break
		}
		pid, _ = strconv.Atoi(fields[1])
	}
	entries, _ := os.ReadDir("/proc")
	var names []string
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		var st unix.Stat_t
		if err != nil || forebears[pid] || unix.Stat("/proc/"+e.Name(), &st) != nil || int(st.Uid) != os.Getuid() {
			continue
		}
		if env := read("/proc/" + e.Name() + "/environ"); strings.Contains(env, markVariable+"=") {
			names = append(names, read("/proc/"+e.Name()+"/comm"))
		}
	}
	return strings.Join(names, "")
}

func afterName(stat string) string { return stat[strings.LastIndexByte(stat, ')')+1:] }

// ownSysV lists the SysV objects that this user made.
func ownSysV() string {
	var b strings.Builder
	for _, kind := range []string{"shm", "sem", "msg"} {
		for line := range strings.Lines(read("/proc/sysvipc/" + kind)) {
			fields := strings.Fields(line)
			if len(fields) > 0 && fields[0] == strconv.Itoa(sysVKey()) {
				b.WriteString(kind + " " + fields[0] + "\n")
			}
		}
	}
	return b.String()
}

// mounts are the mount points of the sandbox.
func mounts() string {
	if !isolated() {
		return ""
	}
	var points []string
	for line := range strings.Lines(read("/proc/self/mounts")) {
		if f := strings.Fields(line); len(f) > 3 && !strings.HasPrefix(f[1], "/build") {
			points = append(points, f[1]+" "+f[2])
		}
	}
	slices.Sort(points) // a renewed one comes last
	return strings.Join(points, "\n")
}

// sockets are those that listen at the port where an attack does.
func sockets() string {
	return grep("/proc/net/tcp", fmt.Sprintf(":%04X 00000000:0000 0A", leftPort()))
}

func descriptors() string {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err.Error()
	}
	var open []string
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && !strings.HasPrefix(target, "anon_inode:") && !strings.HasPrefix(target, "/proc/") {
			open = append(open, e.Name()+" "+filepath.Base(target))
		}
	}
	return strings.Join(open, "\n")
}

func nice() string {
	n, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		return err.Error()
	}
	return strconv.Itoa(n)
}

// keysOf are the keys of ours in a keyring.
func keysOf(ring int) string {
	id, err := unix.KeyctlSearch(ring, "user", leftName(), 0)
	if err != nil {
		return ""
	}
	return strconv.Itoa(min(id, 1)) // that there is one
}
