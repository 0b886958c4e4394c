package gate

import (
	"bufio"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
)

const (
	// maxDefaultConnections is what MaxConnections is at most unless it is given: as
	// many take some GiB.
	maxDefaultConnections = 65_536
	// unknownMemory is what is taken for the machine's memory where it is not told.
	unknownMemory = 8 << 30
	// minMemory is the least that is.
	minMemory = 256 << 20
)

// fileLimit is how many files this process may have open, or as many as
// connections may take of them.
func fileLimit() int {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 1024 // what systems have at the least
	}
	return int(min(l.Cur, maxDefaultConnections/3*4+1)) //nolint:gosec // bounded
}

// defaultMemory is how much memory may be in use unless somebody says. The garbage
// collector does next to nothing else above its limit, so that this is no more.
func defaultMemory() int64 {
	return max(minMemory, min(machineMemory("/")/4*3, debug.SetMemoryLimit(-1)))
}

// machineMemory is how much memory there is for this process, in bytes: the
// machine's, or that of the control groups that it is in. The files that tell are
// below root.
func machineMemory(root string) int64 {
	least := int64(math.MaxInt64)
	for _, line := range lines(filepath.Join(root, "proc/meminfo")) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "MemTotal:" {
			least = lower(least, f[1], 1<<10)
		}
	}
	if least == math.MaxInt64 {
		least = unknownMemory
	}
	for _, line := range lines(filepath.Join(root, "proc/self/cgroup")) {
		f := strings.SplitN(line, ":", 3)
		if len(f) < 3 {
			continue
		}
		dir, file := "sys/fs/cgroup", "memory.max"
		if f[1] == "memory" {
			dir, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
		} else if f[1] != "" {
			continue
		}
		// Those above limit it too; in a container the path may be that outside.
		for group := f[2]; ; group = filepath.Dir(group) {
			for _, text := range lines(filepath.Join(root, dir, group, file)) {
				least = lower(least, text, 1)
			}
			if group == "/" || group == "." {
				break
			}
		}
	}
	return max(least, minMemory)
}

// lower is the lower one of least and text in units, where that is a number.
func lower(least int64, text string, unit int64) int64 {
	n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
	if err != nil || n <= 0 || n > least/unit {
		return least
	}
	return n * unit
}

// lines are those of a small file; none if there is no such file.
func lines(path string) []string {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close() //nolint:errcheck // opened for reading
	var out []string
	for s := bufio.NewScanner(f); s.Scan(); {
		out = append(out, s.Text())
	}
	return out
}
