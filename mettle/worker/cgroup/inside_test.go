//go:build linux

package cgroup

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// inside is an Inside with files that the test writes.
func inside(t testing.TB, h handover, texts map[role]string) (*Inside, map[role]*os.File) {
	t.Helper()
	in := &Inside{into: -1, limit: h.MemoryBytes, uncounted: h.Uncounted, files: map[role]int{}}
	files := map[role]*os.File{}
	for r, text := range texts {
		path := filepath.Join(t.TempDir(), "file")
		put(t, path, text)
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		files[r], in.files[r] = f, int(f.Fd())
	}
	return in, files
}

func TestInside_endTellsWhatWasUsed(t *testing.T) {
	for _, tc := range []struct {
		name          string
		limit         int64
		before, after map[role]string
		want          Used
	}{
		{"nothing known", 0, nil, nil, Used{}},
		{
			"version 2", 0,
			map[role]string{roleUsage: "1000\n", rolePeak: "9000\n", roleEvents: "max 3\noom 1\noom_kill 1\n", roleForks: "max 2\n", roleCPU: "usage_usec 30\nuser_usec 10\nsystem_usec 20\n"},
			map[role]string{rolePeak: "5000\n", roleEvents: "max 9\noom 2\noom_kill 4\n", roleForks: "max 5\n", roleCPU: "usage_usec 90\nuser_usec 50\nsystem_usec 40\n"},
			Used{PeakMemoryBytes: 4000, User: 40 * time.Microsecond, System: 20 * time.Microsecond, Killed: 3, OwnLimit: true, Refused: 3},
		},
		{
			"killed for a group above", 0,
			map[role]string{roleEvents: "oom 1\noom_kill 1\n"},
			map[role]string{roleEvents: "oom 1\noom_kill 2\n"},
			Used{Killed: 1},
		},
		{
			"version 1", 1 << 30,
			map[role]string{roleUsage: "0", rolePeak: "0", roleEvents: "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n", roleUser: "1000\n", roleSystem: "2000\n"},
			map[role]string{rolePeak: strconv.Itoa(1<<30 - 4096), roleEvents: "oom_kill_disable 0\nunder_oom 0\noom_kill 8\n", roleUser: "9000\n", roleSystem: "3000\n"},
			Used{PeakMemoryBytes: 1<<30 - 4096, User: 8 * time.Microsecond, System: time.Microsecond, Killed: 1, OwnLimit: true},
		},
		{
			"version 1, far below the limit", 1 << 30,
			map[role]string{roleUsage: "0", rolePeak: "0", roleEvents: "oom_kill 7\n"},
			map[role]string{rolePeak: "1000000", roleEvents: "oom_kill 8\n"},
			Used{PeakMemoryBytes: 1000000, Killed: 1},
		},
		{
			"a peak of all times that has risen", 0,
			map[role]string{roleUsage: "100\n", roleAllTimePeak: "500\n"},
			map[role]string{roleAllTimePeak: "800\n"},
			Used{PeakMemoryBytes: 700},
		},
		{
			"a peak of all times that has not", 0,
			map[role]string{roleUsage: "100\n", roleAllTimePeak: "500\n"},
			map[role]string{roleUsage: "300\n", roleAllTimePeak: "500\n"},
			Used{PeakMemoryBytes: 200},
		},
		{
			"no peak", 0, map[role]string{roleUsage: "100\n"}, map[role]string{roleUsage: "700\n"}, Used{PeakMemoryBytes: 600},
		},
		{"no numbers", 0, map[role]string{roleUsage: "x\n", rolePeak: "\n", roleEvents: "oom_kill\noom_kill x\n", roleCPU: "\n"}, nil, Used{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in, files := inside(t, handover{MemoryBytes: tc.limit, Uncounted: tc.limit > 0}, tc.before)
			in.Begin()
			for r, text := range tc.after {
				if err := files[r].Truncate(0); err != nil {
					t.Fatal(err)
				}
				if _, err := files[r].WriteAt([]byte(text), 0); err != nil {
					t.Fatal(err)
				}
			}
			if in.Sampled() {
				in.Sample()
			}
			if diff := cmp.Diff(tc.want, in.End()); diff != "" {
				t.Errorf("used (-want +got):\n%s", diff)
			}
		})
	}
}

func TestTake_refusesWhatIsNoHandover(t *testing.T) {
	if _, err := Take("{", 4); err == nil {
		t.Error("Take of half a text succeeded")
	}
	in, err := Take("", 4)
	if err != nil {
		t.Fatal(err)
	}
	in.Begin()
	if used := in.End(); used != (Used{}) || in.Kill() || in.Join() != nil {
		t.Errorf("without a group: %+v", used)
	}
}

// BenchmarkInside is what a command pays beside the kernel's own accounting.
func BenchmarkInside(b *testing.B) {
	g, err := here(b, Memory).NewGroup(runner.Limits{MemoryBytes: 1 << 30})
	if err != nil {
		b.Fatal(err)
	}
	defer g.Close()
	_, files := g.Handover()
	in := &Inside{into: -1, files: map[role]int{}}
	for i, f := range files {
		in.files[g.handed.Roles[i]] = int(f.Fd())
	}
	b.ReportAllocs()
	for b.Loop() {
		in.Begin()
		in.End()
	}
}
