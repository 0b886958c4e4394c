//go:build linux

package worker

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
)

// memory tells how much of it is left for actions: on the machine, and in the
// control groups that the worker is in, whichever is less. Page cache counts as
// free. It is safe for concurrent use.
type memory struct {
	root   string // of the file system; "/" but in tests
	limit  int64  // what is to be available, in bytes; not above 0: nothing
	groups []group
	// low says that it was low when last looked at: a quarter more than the limit
	// has to be available then, so that the worker does not waver.
	low atomic.Bool
}

// group is the files of one control group with memory limits.
type group struct{ max, current, stat, inactive, active string }

// maxDefaultFreeMemory is the most that must be available where Options do not
// say: what is left of a machine that thrashes.
const maxDefaultFreeMemory = 512 << 20

// newMemory finds the control groups. MinFree is that of Options.
func newMemory(root string, minFree int64) (*memory, error) {
	m := &memory{root: root, limit: minFree}
	if minFree < 0 {
		return m, nil
	}
	m.groups = m.findGroups()
	if minFree == 0 {
		total, _, err := m.machine()
		if err != nil {
			return nil, err
		}
		for _, g := range m.groups {
			if limit, ok := m.number(g.max); ok {
				total = min(total, limit)
			}
		}
		m.limit = min(maxDefaultFreeMemory, total/20)
	}
	return m, nil
}

// check returns an error that says so where memory is low.
func (m *memory) check() error {
	if m.limit <= 0 {
		return nil
	}
	free, err := m.available()
	if err != nil {
		return err
	}
	limit := m.limit
	if m.low.Load() {
		limit += limit / 4
	}
	m.low.Store(free < limit)
	if free < limit {
		return fmt.Errorf("memory is low: %d bytes are available, less than the limit of %d", free, limit)
	}
	return nil
}

// available is how much memory actions can have, in bytes.
func (m *memory) available() (int64, error) {
	_, free, err := m.machine()
	if err != nil {
		return 0, err
	}
	for _, g := range m.groups {
		limit, limited := m.number(g.max)
		current, ok := m.number(g.current)
		if !limited || !ok || limit-current >= free {
			continue
		}
		stat := m.fields(g.stat)
		free = min(free, limit-current+stat[g.inactive]+stat[g.active])
	}
	return free, nil
}

// machine reads /proc/meminfo, in bytes.
func (m *memory) machine() (total, available int64, err error) {
	info := m.fields("proc/meminfo")
	total, available = info["MemTotal"], info["MemAvailable"]
	if total == 0 {
		return 0, 0, fmt.Errorf("%s does not tell the size of the memory", filepath.Join(m.root, "proc/meminfo"))
	}
	return total << 10, available << 10, nil
}

// findGroups finds the worker's control group and those above it, of version 2 or 1.
func (m *memory) findGroups() []group {
	data, err := os.ReadFile(filepath.Join(m.root, "proc/self/cgroup"))
	if err != nil {
		return nil
	}
	var out []group
	for line := range strings.Lines(string(data)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		for dir := filepath.Clean("/" + parts[2]); ; dir = filepath.Dir(dir) {
			switch {
			case parts[0] == "0" && parts[1] == "":
				d := filepath.Join("sys/fs/cgroup", dir)
				out = append(out, group{filepath.Join(d, "memory.max"), filepath.Join(d, "memory.current"), filepath.Join(d, "memory.stat"), "inactive_file", "active_file"})
			case strings.Contains(","+parts[1]+",", ",memory,"):
				d := filepath.Join("sys/fs/cgroup/memory", dir)
				out = append(out, group{
					filepath.Join(d, "memory.limit_in_bytes"), filepath.Join(d, "memory.usage_in_bytes"), filepath.Join(d, "memory.stat"),
					"total_inactive_file", "total_active_file",
				})
			}
			if dir == "/" {
				break
			}
		}
	}
	// Those without a limit, and those that can't be seen from here, don't matter;
	// a limit that is set later does.
	keep := out[:0]
	for _, g := range out {
		if _, err := os.Stat(filepath.Join(m.root, g.max)); err == nil {
			keep = append(keep, g)
		}
	}
	return keep
}

// number reads a file with one number.
func (m *memory) number(name string) (int64, bool) {
	data, err := os.ReadFile(filepath.Join(m.root, name))
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	return n, err == nil // "max" is none
}

// fields reads a file of lines with a name and a number.
func (m *memory) fields(name string) map[string]int64 {
	data, err := os.ReadFile(filepath.Join(m.root, name))
	if err != nil {
		return nil
	}
	out := make(map[string]int64)
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		if f := strings.Fields(lines.Text()); len(f) >= 2 {
			if n, err := strconv.ParseInt(f[1], 10, 64); err == nil {
				out[strings.TrimSuffix(f[0], ":")] = n
			}
		}
	}
	return out
}
