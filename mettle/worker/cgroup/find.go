//go:build linux

package cgroup

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// hierarchy is one tree of control groups that this machine has, and the worker's
// own group in it.
type hierarchy struct {
	version     int      // 1 or 2
	controllers []string // of version 1; of 2 it is the group that says
	dir         string   // the worker's own group
}

// membership is a line of /proc/self/cgroup.
type membership struct {
	id          string
	controllers []string
	path        string
}

// parseMemberships reads /proc/PID/cgroup. Lines that are none are passed over.
func parseMemberships(data string) []membership {
	var all []membership
	for line := range strings.Lines(data) {
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(parts) != 3 || !strings.HasPrefix(parts[2], "/") {
			continue
		}
		m := membership{id: parts[0], path: parts[2]}
		if parts[1] != "" {
			m.controllers = strings.Split(parts[1], ",")
		}
		all = append(all, m)
	}
	return all
}

// mountPoint is a mounted hierarchy, or a part of one.
type mountPoint struct {
	version int
	root    string // what of the hierarchy is mounted
	at      string
	options []string // of the file system: its controllers
}

// parseMounts reads /proc/PID/mountinfo, and finds the hierarchies in it: man 5 proc.
func parseMounts(data string) []mountPoint {
	var all []mountPoint
	for line := range strings.Lines(data) {
		before, after, ok := strings.Cut(line, " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 6 || len(right) < 3 {
			continue
		}
		m := mountPoint{root: unescape(left[3]), at: unescape(left[4])}
		switch right[0] {
		case "cgroup2":
			m.version = 2
		case "cgroup":
			m.version, m.options = 1, strings.Split(right[2], ",")
		default:
			continue
		}
		if filepath.IsAbs(m.at) {
			all = append(all, m)
		}
	}
	return all
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, ok := octal(s[i+1 : i+4]); ok {
				b.WriteByte(n)
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func octal(s string) (byte, bool) {
	n := 0
	for _, c := range []byte(s) {
		if c < '0' || c > '7' {
			return 0, false
		}
		n = 8*n + int(c-'0')
	}
	return byte(n), n < 256
}

// find lists the hierarchies in which the worker's own group can be seen from here.
// Root is that of the file system.
func find(root string) []hierarchy {
	groups, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return nil
	}
	mounts, err := os.ReadFile(filepath.Join(root, "proc/self/mountinfo"))
	if err != nil {
		return nil
	}
	points := parseMounts(string(mounts))
	var all []hierarchy
	for _, m := range parseMemberships(string(groups)) {
		for _, p := range points {
			if dir, ok := p.locate(m); ok && isDir(filepath.Join(root, dir)) {
				all = append(all, hierarchy{version: p.version, controllers: m.controllers, dir: filepath.Join(root, dir)})
				break
			}
		}
	}
	return all
}

// locate is where the group of m is below the mount point.
func (p *mountPoint) locate(m membership) (dir string, ok bool) {
	switch {
	case p.version == 2:
		if m.id != "0" || len(m.controllers) > 0 {
			return "", false
		}
	case len(m.controllers) == 0:
		return "", false
	default:
		for _, c := range m.controllers {
			if !slices.Contains(p.options, c) {
				return "", false
			}
		}
	}
	rel, err := filepath.Rel(p.root, m.path)
	if err != nil || !filepath.IsLocal(rel) {
		return "", false // outside of what is mounted, or of the namespace
	}
	return filepath.Join(p.at, rel), true
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}

// Unified lists where version 2 is mounted.
func Unified() ([]string, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var all []string
	for _, p := range parseMounts(string(mounts)) {
		if p.version == 2 {
			all = append(all, p.at)
		}
	}
	return all, nil
}
