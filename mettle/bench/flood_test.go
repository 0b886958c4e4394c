package bench_test

import (
	"os"
	"testing"
)

// Another client's calls are measured during a flood, and its own are counted.
func TestRun_load(t *testing.T) {
	o := quick(newFake().start(t), "load")
	o.LoadCalls, o.LoadConnections, o.ServerPIDs = 3, 3, []int{os.Getpid()}
	for _, flood := range []string{"FindMissing", "Read not taken", "without a word"} {
		o.LoadFloods = flood
		rep, err := run(t, o)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rep.Results {
			if r.Ops == 0 || r.LatencyMS == nil || r.QuietLatencyMS == nil || r.FloodCalls != 3 || r.Server == nil || r.Server.PeakRSSBytes == 0 {
				t.Errorf("%s: figures are absent: %+v", r.Case, r)
			}
		}
	}
}
