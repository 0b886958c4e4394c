package bench_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mettle-build/mettle/mettle/bench"
)

func TestFleet(t *testing.T) {
	var out bytes.Buffer
	o := bench.FleetOptions{Options: quick(""), Servers: []int{1, 2}}
	o.Out, o.Concurrency = &out, []int{1, 3}
	var stopped []int
	remotes := []string{newFake().start(t), newFake().start(t)}
	o.Start = func(_ context.Context, servers int) (*bench.RunningFleet, error) {
		return &bench.RunningFleet{Remotes: remotes[:servers], PIDs: []int{os.Getpid()}, Workers: "7 workers", Stop: func() error {
			stopped = append(stopped, servers)
			return nil
		}}, nil
	}
	if err := bench.Fleet(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	var rep bench.Report
	if err := json.Unmarshal(out.Bytes(), &rep); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range rep.Results {
		got = append(got, fmt.Sprintf("%s: %d", r.Case, r.Clients))
		if r.Clients == 0 {
			if r.Server == nil || r.Server.RSSBytes <= 0 || r.Unit != "cores" {
				t.Errorf("%s: server %+v, unit %s", r.Case, r.Server, r.Unit)
			}
			continue
		}
		checkResult(t, &r)
		// By the fake's metadata, within what a histogram tells apart.
		if h := r.HandOffMS; h == nil || h.P50 < 1980 || h.P99 > 2020 {
			t.Errorf("%s: hand-off is %+v, want 2 s", r.Case, h)
		}
	}
	want := []string{
		"1 API server, 7 workers, idle: 0", "1 API server, 7 workers: 1", "1 API server, 7 workers: 3",
		"2 API servers, 7 workers, idle: 0", "2 API servers, 7 workers: 1", "2 API servers, 7 workers: 3",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("results (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]int{1, 2}, stopped); d != "" {
		t.Errorf("stopped (-want +got):\n%s", d)
	}
}

func TestFleet_errors(t *testing.T) {
	broken := errors.New("it broke")
	remotes := []string{newFake().start(t)}
	for name, start := range map[string]func(context.Context, int) (*bench.RunningFleet, error){
		"at the start": func(context.Context, int) (*bench.RunningFleet, error) { return nil, broken },
		"at the end": func(context.Context, int) (*bench.RunningFleet, error) {
			return &bench.RunningFleet{Remotes: remotes, Stop: func() error { return broken }}, nil
		},
		"no such process": func(context.Context, int) (*bench.RunningFleet, error) {
			return &bench.RunningFleet{Remotes: remotes, PIDs: []int{-1}, Stop: func() error { return broken }}, nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := bench.FleetOptions{Options: quick(""), Servers: []int{1}, Start: start}
			o.Out = &bytes.Buffer{}
			if err := bench.Fleet(t.Context(), o); !errors.Is(err, broken) {
				t.Errorf("Fleet: %v, want %v", err, broken)
			}
		})
	}
}
