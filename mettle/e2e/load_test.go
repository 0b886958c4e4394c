package e2e_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mettle-build/mettle/mettle/bench"
)

// loadVar has TestElan_load be of full size: 10,000 calls, 1,000 connections.
const loadVar = "METTLE_LOAD"

// noOperations is a line of a server's metrics.
var noOperations = regexp.MustCompile(`(?m)^mettle_operations\{.*\} 0$`)

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
	withstands(t, s, bench.Options{Duration: duration, LoadCalls: calls, LoadConnections: connections}, floods, ceiling)
}

// One client that executes all it can, slow actions that wait for a worker, leaves
// the server's memory below its limit, and another client's calls succeed. When it is
// gone, its operations are.
func TestDual_load(t *testing.T) {
	calls, maxMemory, duration := 300, 256<<20, 500*time.Millisecond
	ceiling := 500 << 20
	floods := []string{"WaitExecution"}
	if os.Getenv(loadVar) != "" {
		calls, maxMemory, duration = 10_000, 1<<30, 8*time.Second
		ceiling = 2 << 30
		floods = []string{"Execute that waits", "WaitExecution"}
	}
	if raceEnabled {
		ceiling *= 3
	}
	s := startDual(t, storeDir(t), "--slots=1", "--abandon_after=1s", "--max_memory="+strconv.Itoa(maxMemory))
	withstands(t, s, bench.Options{Duration: duration, LoadCalls: calls}, floods, ceiling)
	poll(t, "the operations to be abandoned", func() bool {
		text := s.metrics(t)
		n := strings.Count(text, "\nmettle_operations{")
		return n > 0 && n == len(noOperations.FindAllString(text, -1))
	})
}

// withstands has s stand floods, with at most so many bytes of memory.
func withstands(t *testing.T, s *server, o bench.Options, floods []string, ceiling int) {
	t.Helper()
	for _, flood := range floods {
		var out bytes.Buffer
		o.Subjects, o.Remote, o.JSON, o.Out = []string{"load"}, "grpc://"+s.Addr(), true, &out
		o.LoadFloods, o.ServerPIDs = flood, []int{s.cmd.Process.Pid}
		err := bench.Run(t.Context(), o)
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

// metrics is what the server tells of itself.
func (s *server) metrics(t *testing.T) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1:"+strconv.Itoa(s.HTTPPort)+"/metrics", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
