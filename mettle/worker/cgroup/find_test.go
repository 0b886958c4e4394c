//go:build linux

package cgroup

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The layouts of machines, as their /proc/self/{cgroup,mountinfo} tell them.
const (
	hybridGroups = `9:name=systemd:/
8:pids:/
4:memory:/api/7e05
2:cpuacct:/
1:cpu:/
0::/
`
	hybridMounts = `27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
33 31 0:30 / /sys/fs/cgroup/cpuacct rw,relatime - cgroup cgroup rw,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
`
	systemdGroups = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/mettle.service\n"
	systemdMounts = "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"

	dockerV1Groups = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n3:pids:/docker/abc\n"
	dockerV1Mounts = `700 690 0:30 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro,nosuid - cgroup cgroup rw,cpu,cpuacct
701 690 0:31 /docker/abc /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory
702 690 0:32 /docker/abc /odd\040place/pids rw,nosuid - cgroup cgroup rw,pids
`
)

// machine makes the files of a machine, with the groups that are given.
func machine(t testing.TB, groups, mounts string, dirs ...string) string {
	t.Helper()
	root := t.TempDir()
	put(t, filepath.Join(root, "proc/self/cgroup"), groups)
	put(t, filepath.Join(root, "proc/self/mountinfo"), mounts)
	for _, d := range dirs {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func put(t testing.TB, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestFind(t *testing.T) {
	for _, tc := range []struct {
		name, groups, mounts string
		dirs                 []string
		want                 []string // version, controllers, directory
	}{
		{
			"both versions", hybridGroups, hybridMounts,
			[]string{"sys/fs/cgroup/cpu", "sys/fs/cgroup/cpuacct", "sys/fs/cgroup/memory/api/7e05", "sys/fs/cgroup/pids", "sys/fs/cgroup/unified"},
			[]string{
				"1 pids /sys/fs/cgroup/pids", "1 memory /sys/fs/cgroup/memory/api/7e05", "1 cpuacct /sys/fs/cgroup/cpuacct", "1 cpu /sys/fs/cgroup/cpu",
				"2  /sys/fs/cgroup/unified",
			},
		},
		{
			"systemd", systemdGroups, systemdMounts,
			[]string{"sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice/mettle.service"},
			[]string{"2  /sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice/mettle.service"},
		},
		{
			"container of version 1, odd places", dockerV1Groups, dockerV1Mounts,
			[]string{"sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup/memory", "odd place/pids"},
			[]string{"1 cpu,cpuacct /sys/fs/cgroup/cpu,cpuacct", "1 memory /sys/fs/cgroup/memory", "1 pids /odd place/pids"},
		},
		{"container with a namespace", "0::/\n", "30 23 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n", []string{"sys/fs/cgroup"}, []string{"2  /sys/fs/cgroup"}},
		{"outside of the namespace", "0::/../../other\n", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n", []string{"sys/fs/cgroup"}, nil},
		{"a part is mounted that the worker is not in", "0::/a/b\n", "30 23 0:26 /c /sys/fs/cgroup rw - cgroup2 cgroup rw\n", []string{"sys/fs/cgroup"}, nil},
		{"the group has gone", "0::/a\n", systemdMounts, []string{"sys/fs/cgroup"}, nil},
		{"mounted twice, seen in the second", "0::/a/b\n", "30 23 0:26 /x /one rw - cgroup2 c rw\n31 23 0:26 /a /two rw - cgroup2 c rw\n", []string{"one", "two/b"}, []string{"2  /two/b"}},
		{"no groups", "", "", nil, nil},
		{"not a kernel", "\x00\n::\n0:\n0::x\n", "- - -\n1 2 3 / relative rw - cgroup2 a b\n", nil, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := machine(t, tc.groups, tc.mounts, tc.dirs...)
			var got []string
			for _, h := range find(root) {
				got = append(got, strings.Join([]string{string('0' + rune(h.version)), strings.Join(h.controllers, ","), strings.TrimPrefix(h.dir, root)}, " "))
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("hierarchies (-want +got):\n%s", diff)
			}
		})
	}
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{
		`/plain`: "/plain", `/a\040b`: "/a b", `/\134x`: `/\x`, `/end\04`: `/end\04`, `/\999`: `/\999`, `/\777`: `/\777`, `\011`: "\t",
	} {
		if got := unescape(in); got != want {
			t.Errorf("unescape(%q) = %q, want %q", in, got, want)
		}
	}
}

// Whatever the two files hold, no directory outside of what is mounted is found.
func FuzzFind(f *testing.F) {
	f.Add(hybridGroups, hybridMounts)
	f.Add(systemdGroups, systemdMounts)
	f.Add(dockerV1Groups, dockerV1Mounts)
	f.Add("0::/../..\n", systemdMounts)
	f.Fuzz(func(t *testing.T, groups, mounts string) {
		for _, m := range parseMemberships(groups) {
			for _, p := range parseMounts(mounts) {
				dir, ok := p.locate(m)
				if !ok {
					continue
				}
				if rel, err := filepath.Rel(p.at, dir); err != nil || !filepath.IsAbs(dir) || !filepath.IsLocal(rel) {
					t.Errorf("the group of %+v is at %s, outside of %s", m, dir, p.at)
				}
			}
		}
	})
}
