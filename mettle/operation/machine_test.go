package operation_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"

	"github.com/mettle-build/mettle/mettle/operation"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// TestMachine_transcripts replays testdata/*.txt: one event a line, and what the
// machine makes of it. Rewrite the answers with -rewrite, and read the diff.
//
//	new               a new machine
//	step              events, one a line:
//	  accept [skip] | hit RESPONSE | miss | published | publish-failed ERROR
//	  executing ATTEMPT WORKER [METADATA [STDOUT_STREAM [STDERR_STREAM]]] | requeued ATTEMPT | completed ATTEMPT WORKER RESPONSE | unheard-of ATTEMPT WORKER
//	  join | leave | timer | cancel | withdrawn [ATTEMPT] | taken-over | took-over
func TestMachine_transcripts(t *testing.T) {
	datadriven.Walk(t, "testdata/machine", func(t *testing.T, path string) {
		m := &operation.Machine{}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			if d.Cmd == "new" {
				m = &operation.Machine{}
			}
			var out strings.Builder
			for line := range strings.Lines(d.Input) {
				e, err := parseEvent(strings.Fields(line))
				if err != nil {
					t.Fatalf("%s: %q: %v", d.Pos, line, err)
				}
				effects := m.Step(e)
				fmt.Fprintf(&out, "%-26s → %-22s | %s\n", strings.TrimSpace(line), effects, describe(m))
			}
			return out.String()
		})
	})
}

func describe(m *operation.Machine) string {
	s := m.Snapshot()
	var b strings.Builder
	fmt.Fprintf(&b, "%s waiters=%d", s.Stage, m.Waiters())
	if s.Attempt > 0 {
		fmt.Fprintf(&b, " attempt=%d", s.Attempt)
	}
	for _, kv := range [][2]string{{"worker", s.Worker}, {"metadata", string(s.Metadata)}, {"stdout", s.StdoutStream}, {"stderr", s.StderrStream}, {"response", string(s.Response)}} {
		if kv[1] != "" {
			fmt.Fprintf(&b, " %s=%s", kv[0], kv[1])
		}
	}
	if s.Err != nil {
		fmt.Fprintf(&b, " err=%q", s.Err)
	}
	return b.String()
}

func parseEvent(f []string) (operation.Event, error) {
	arg := func(i int) string {
		if i < len(f) {
			return f[i]
		}
		return ""
	}
	update := func(stage queuepb.Update_Stage) operation.Event {
		u := &queuepb.Update{Stage: stage, Worker: arg(2)}
		fmt.Sscan(arg(1), &u.Attempt) //nolint:errcheck // an odd number is attempt 0
		if stage == queuepb.Update_COMPLETED {
			u.ExecuteResponse = []byte(arg(3))
		} else {
			u.PartialMetadata = []byte(arg(3))
			u.StdoutStreamName, u.StderrStreamName = arg(4), arg(5)
		}
		return operation.Event{Kind: operation.Updated, Update: u}
	}
	switch arg(0) {
	case "accept":
		if arg(1) == "skip" {
			return operation.Event{Kind: operation.AcceptedSkip}, nil
		}
		return operation.Event{Kind: operation.Accepted}, nil
	case "hit":
		return operation.Event{Kind: operation.CacheHit, Response: []byte(arg(1))}, nil
	case "miss":
		return operation.Event{Kind: operation.CacheMiss}, nil
	case "published":
		return operation.Event{Kind: operation.Published}, nil
	case "publish-failed":
		return operation.Event{Kind: operation.PublishFailed, Err: errors.New(arg(1))}, nil
	case "executing":
		return update(queuepb.Update_EXECUTING), nil
	case "requeued":
		return update(queuepb.Update_REQUEUED), nil
	case "completed":
		return update(queuepb.Update_COMPLETED), nil
	case "unspecified":
		return update(queuepb.Update_STAGE_UNSPECIFIED), nil
	case "unheard-of":
		return update(queuepb.Update_Stage(99)), nil
	case "join":
		return operation.Event{Kind: operation.Joined}, nil
	case "leave":
		return operation.Event{Kind: operation.Left}, nil
	case "timer":
		return operation.Event{Kind: operation.Abandoned}, nil
	case "cancel":
		return operation.Event{Kind: operation.Cancelled}, nil
	case "withdrawn":
		e := operation.Event{Kind: operation.Withdrawn}
		if arg(1) != "" {
			e.Update = update(queuepb.Update_COMPLETED).Update
		}
		return e, nil
	case "taken-over":
		return operation.Event{Kind: operation.TakenOver}, nil
	case "took-over":
		return operation.Event{Kind: operation.TookOver}, nil
	}
	return operation.Event{}, errors.New("unknown event")
}
