//go:build linux

package hostile_test

import (
	"testing"

	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/cgroup"
	"github.com/mettle-build/mettle/mettle/worker/hostile"
	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// TestLimits has actions want more than there is, with limits that the machine holds
// them to. Each ends by itself in a while, should the limit not hold.
func TestLimits(t *testing.T) {
	needsRoot(t)
	tree := cgroup.Open(cgroup.Options{})
	defer tree.Close()
	for _, c := range []cgroup.Controller{cgroup.Memory, cgroup.Processes} {
		if err := tree.Missing(c); err != nil {
			t.Skipf("this machine does not allow it: %v", err)
		}
	}
	for name, way := range map[string]hostile.Way{"sandbox": hostile.Sandbox, "bare": hostile.Bare} {
		t.Run(name, func(t *testing.T) {
			if way == hostile.Sandbox {
				allowsSandbox(t)
			}
			m := newMachine(t, way, 1, func(o *worker.Options) {
				o.Limits = runner.Limits{MemoryBytes: 256 << 20, Processes: 200, DiskBytes: 64 << 20}
			})
			for _, c := range []struct {
				name, script string
				want         hostile.Outcome
			}{
				{
					"forks without end", `printf '#!/bin/sh\ni=0; while [ $i -lt 3 ]; do ./b.sh & i=$((i+1)); done 2>/dev/null; sleep 20\n' > b.sh; chmod +x b.sh; (./b.sh 2>/dev/null &); sleep 0.3`,
					hostile.Outcome{Verdict: hostile.AsUser},
				},
				{"takes all memory", `ulimit -v 4000000; tail /dev/zero`, hostile.Outcome{Verdict: hostile.Exits, Code: 137, Says: "out of memory"}},
				{"takes all memory in a child that is left", `ulimit -v 4000000; (setsid tail /dev/zero &); sleep 1`, hostile.Outcome{Verdict: hostile.Exits, Code: 137, Says: "out of memory"}},
				{"fills the disk", `head -c 2G /dev/zero > a; sleep 20`, hostile.Outcome{Verdict: hostile.Exits, Code: 137, Says: "disk quota"}},
				{
					"fills the disk with files that have no name",
					`for i in 3 4 5 6 7; do eval "exec $i> a"; rm a; eval "head -c 40M /dev/zero >&$i"; done; sleep 20`,
					hostile.Outcome{Verdict: hostile.Exits, Code: 137, Says: "disk quota"},
				},
				{"fills the disk by a child that is left", `(setsid head -c 2G /dev/zero > a &); sleep 20`, hostile.Outcome{Verdict: hostile.Exits, Code: 137, Says: "disk quota"}},
				{"makes a sparse file of 1 TB", `truncate -s 1T out`, hostile.Outcome{Verdict: hostile.Exits, Code: 153}}, // SIGXFSZ
			} {
				t.Run(c.name, func(t *testing.T) {
					attack := hostile.Case{Script: c.script, Outputs: []string{"out"}, Want: [4]hostile.Outcome{c.want, c.want, c.want, c.want}}
					m.attack(t, &attack)
				})
			}
		})
	}
}
