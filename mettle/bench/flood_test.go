package bench_test

import (
	"os"
	"testing"
)

// Another client's calls are measured during a flood, and its own are counted.
func TestRun_load(t *testing.T) {
	o := quick(newFake().start(t), "load")
	o.LoadCalls, o.LoadConnections, o.ServerPIDs = 3, 3, []int{os.Getpid()}
	for _, flood := range []string{"FindMissing", " Read not taken", "Execute that waits", "WaitExecution", "idle", "in the preface"} {
		o.LoadFloods = flood
		rep, err := run(t, o)
		if err != nil {
			t.Fatal(err)
		}
		if len(rep.Results) != 1 {
			t.Errorf("%s: %d floods", flood, len(rep.Results))
		}
		for _, r := range rep.Results {
			if r.Ops == 0 || r.LatencyMS == nil || r.QuietLatencyMS == nil || r.FloodCalls != 3 || r.Server == nil || r.Server.PeakRSSBytes == 0 {
				t.Errorf("%s: figures are absent: %+v", r.Case, r)
			}
		}
	}
}

// Connections that stop in TLS are for servers that speak it.
func TestRun_load_without_tls(t *testing.T) {
	o := quick(newFake().start(t), "load")
	o.LoadConnections, o.LoadFloods = 3, "stop in TLS"
	rep, err := run(t, o)
	if err != nil {
		t.Fatal(err)
	}
	if len(rep.Results) != 1 || rep.Results[0].Skipped == "" {
		t.Errorf("got %+v, want one that is skipped", rep.Results)
	}
}
