package e2e_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/mettle-build/mettle/mettle/bench"
)

// loadVar has TestElan_load be of full size: 10,000 calls, 1,000 connections.
const loadVar = "METTLE_LOAD"

// descriptors is how many a server has open.
func descriptors(t *testing.T, s *server) float64 {
	t.Helper()
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return float64(len(open))
}

// One client that wants all it can get, or says nothing, or takes nothing of what
// it asked for, leaves the server's memory below its limit, and another client's
// calls succeed.
func TestElan_load(t *testing.T) {
	calls, connections, maxMemory, duration := 300, 200, 256<<20, time.Second
	// What the process has beside the limit on its heap: its text, stacks, and what
	// comes in while the garbage is collected.
	ceiling := 700 << 20
	if os.Getenv(loadVar) != "" {
		calls, connections, maxMemory, duration = 10_000, 1000, 1<<30, 8*time.Second
		ceiling = 2 << 30
	}
	if raceEnabled {
		ceiling *= 3 // the race detector's own memory
	}
	floods := []string{"FindMissing", "Read not taken", "without a word"}
	if os.Getenv(loadVar) != "" {
		floods = []string{""} // all
	}
	s := startElan(t, "file://"+t.TempDir()+"?max_size=8GB", "--max_memory="+strconv.Itoa(maxMemory))
	for _, flood := range floods {
		var out bytes.Buffer
		err := bench.Run(t.Context(), bench.Options{
			Subjects: []string{"load"}, Remote: "grpc://" + s.Addr(), Duration: duration, JSON: true, Out: &out,
			LoadCalls: calls, LoadConnections: connections, LoadFloods: flood, ServerPIDs: []int{s.cmd.Process.Pid},
		})
		if err != nil {
			t.Errorf("calls of the other client: %v", err)
		}
		var rep bench.Report
		if err := json.Unmarshal(out.Bytes(), &rep); err != nil {
			t.Fatalf("%v in %s", err, &out)
		}
		for _, r := range rep.Results {
			switch {
			case r.Skipped != "":
			case r.Ops == 0 || r.Server == nil || r.Server.PeakRSSBytes == 0:
				t.Errorf("%s: no calls of the other client, or no figures: %+v", r.Case, r)
			case r.Server.PeakRSSBytes > float64(ceiling):
				t.Errorf("%s: the server had %.0f MiB, want %d at most", r.Case, r.Server.PeakRSSBytes/(1<<20), ceiling>>20)
			default:
				t.Logf("%s: %.0f MiB before, %.0f at most, %.0f after; p50 %.2f ms, quiet %.2f; the flood: %v", r.Case,
					r.Server.RSSBeforeBytes/(1<<20), r.Server.PeakRSSBytes/(1<<20), r.Server.RSSBytes/(1<<20), r.LatencyMS.P50, r.QuietLatencyMS.P50, r.FloodStatuses)
			}
			if n := r.Server; n != nil {
				awaitNews(t, func() bool { return descriptors(t, s) <= n.DescriptorsBefore+100 }, // soon after that, where the machine is slow
					fmt.Sprintf("%s: %v descriptors before, %v after", r.Case, n.DescriptorsBefore, n.DescriptorsAfter))
			}
		}
	}
}
