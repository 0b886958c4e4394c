package e2e_test

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
)

// The fleet's own benchmark runs, with the queue in memory and over NATS, and
// refuses what makes no sense.
func TestBenchFleet(t *testing.T) {
	program := binary(t, "mettle")
	run := func(t *testing.T, flags ...string) ([]byte, string, error) {
		t.Helper()
		var out, errs bytes.Buffer
		cmd := exec.CommandContext(t.Context(), program, append([]string{"bench", "fleet"}, append(flags, "--json", "--duration=150ms", "--concurrency=4")...)...)
		cmd.Stdout, cmd.Stderr = &out, &errs
		err := cmd.Run()
		return out.Bytes(), errs.String(), err
	}
	nats := newNATS(t)
	nats.Start()
	for name, tc := range map[string]struct {
		flags []string
		want  int // results
	}{
		"memory": {[]string{"--workers=100"}, 2},
		"nats":   {[]string{"--queue=nats://" + nats.Addr() + "/bench?memory=true", "--servers=1,2", "--workers=8"}, 4},
	} {
		t.Run(name, func(t *testing.T) {
			out, errs, err := run(t, tc.flags...)
			if err != nil {
				t.Fatalf("%v\n%s", err, errs)
			}
			var rep struct {
				Results []struct {
					Case    string
					Clients int
					Ops     int
					Errors  int
					HandOff *struct{ P50 float64 } `json:"hand_off_ms"`
				}
			}
			if err := json.Unmarshal(out, &rep); err != nil {
				t.Fatal(err)
			}
			if len(rep.Results) != tc.want {
				t.Errorf("%d results, want %d", len(rep.Results), tc.want)
			}
			for _, r := range rep.Results {
				if r.Errors > 0 || r.Ops == 0 || r.Clients > 0 && (r.HandOff == nil || r.HandOff.P50 <= 0) {
					t.Errorf("%s: %+v", r.Case, r)
				}
			}
		})
	}
	for want, flags := range map[string][]string{
		"measured alone": {"floor"}, "need a --queue": {"--servers=2"}, "--workers": {"--workers=-1"}, "no queue of the kind": {"--queue=redis://x"},
	} {
		if _, errs, err := run(t, flags...); err == nil || !strings.Contains(errs, want) {
			t.Errorf("%v: %v, %s, want %q", flags, err, errs, want)
		}
	}
}
