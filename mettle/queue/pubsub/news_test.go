package pubsub

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// idle is a queue that calls nobody.
func idle(tb testing.TB) *Queue {
	tb.Helper()
	q, err := New(tb.Context(), Options{Project: "p", Prefix: "x", Endpoint: "localhost:1"})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { q.Close() })
	return q
}

func message(tb testing.TB, u *queuepb.Update, seq int, reason string) *pb.PubsubMessage {
	tb.Helper()
	data, err := proto.Marshal(u)
	if err != nil {
		tb.Fatal(err)
	}
	return &pb.PubsubMessage{Data: data, Attributes: map[string]string{attrSeq: strconv.Itoa(seq), attrReason: reason}}
}

// Each case is a list of what arrives, as "attempt stage seq", and what is
// passed on of it.
func TestQueue_fresh(t *testing.T) {
	stages := map[string]queuepb.Update_Stage{"exec": queuepb.Update_EXECUTING, "requeued": queuepb.Update_REQUEUED, "done": queuepb.Update_COMPLETED}
	for _, tc := range []struct {
		name, arrives, want string
		base                uint32
	}{
		{name: "in order", arrives: "1 exec 1, 1 done 2", want: "1 exec, 1 done"},
		{name: "out of order", arrives: "1 done 2, 1 exec 1", want: "1 done"},
		{name: "twice", arrives: "1 exec 1, 1 exec 1, 1 done 2, 1 done 2", want: "1 exec, 1 done"},
		{name: "the later of two", arrives: "1 exec 2, 1 exec 1, 1 exec 3", want: "1 exec, 1 exec"},
		{name: "requeued", arrives: "1 exec 1, 1 requeued 2, 1 exec 3, 2 exec 4, 1 requeued 5", want: "1 exec, 1 requeued, 2 exec"},
		{name: "a result of an older attempt is the end", arrives: "1 exec 1, 2 exec 2, 1 done 3, 2 done 4", want: "1 exec, 2 exec, 2 done"},
		{name: "of an attempt that was withdrawn", arrives: "1 exec 1, 1 done 2, 1001 exec 3, 1001 done 4", want: "1001 exec, 1001 done", base: 1000},
	} {
		t.Run(tc.name, func(t *testing.T) {
			q := idle(t)
			q.operation("a").base = tc.base
			var got []string
			for line := range strings.SplitSeq(tc.arrives, ", ") {
				var attempt uint32
				var stage string
				var seq int
				if _, err := fmt.Sscan(line, &attempt, &stage, &seq); err != nil {
					t.Fatal(err)
				}
				u, _ := q.fresh(message(t, &queuepb.Update{Operation: "a", Attempt: attempt, Stage: stages[stage]}, seq, ""))
				if u == nil {
					continue
				}
				for name, s := range stages {
					if s == u.GetStage() {
						got = append(got, fmt.Sprint(u.GetAttempt(), " ", name))
					}
				}
			}
			if g := strings.Join(got, ", "); g != tc.want {
				t.Errorf("passed on %q, want %q", g, tc.want)
			}
		})
	}
}

// What ends by its attempts names whom this server has heard of.
func TestQueue_fresh_namesWorkers(t *testing.T) {
	q := idle(t)
	q.fresh(message(t, &queuepb.Update{Operation: "a", Attempt: 1, Worker: "one", Stage: queuepb.Update_EXECUTING}, 1, ""))
	q.fresh(message(t, &queuepb.Update{Operation: "a", Attempt: 3, Worker: "three", Stage: queuepb.Update_EXECUTING}, 2, ""))
	u, _ := q.fresh(message(t, &queuepb.Update{Operation: "a", Attempt: 3, Stage: queuepb.Update_COMPLETED}, 3, reasonAttempts))
	var res repb.ExecuteResponse
	if err := proto.Unmarshal(u.GetExecuteResponse(), &res); err != nil {
		t.Fatal(err)
	}
	want := "attempts used up: attempt 1: one fell silent; attempt 2: a worker that had not reported fell silent; attempt 3: three fell silent"
	if got := res.GetStatus().GetMessage(); got != want {
		t.Errorf("message is %q, want %q", got, want)
	}
}

// A server that does not know what was published withdraws what is old enough
// to be meant for sure.
func TestWithdrawal_covers(t *testing.T) {
	q := idle(t)
	now := time.Now()
	cancelled := &pb.PubsubMessage{Attributes: map[string]string{attrOperation: "a"}, PublishTime: stamp(now)}
	if !q.hearCancel(t.Context(), cancelled) {
		t.Fatal("the cancellation was not taken")
	}
	w, _ := q.withdrawn.get("a")
	for name, tc := range map[string]struct {
		publication string
		published   time.Time
		want        bool
	}{
		"old":             {"x", now.Add(-time.Minute), true},
		"about as old":    {"x", now.Add(-clockSkew / 2), false},
		"published again": {"x", now.Add(time.Second), false},
	} {
		if got := w.covers(tc.publication, tc.published); got != tc.want {
			t.Errorf("%s: covered is %v, want %v", name, got, tc.want)
		}
	}
	cancelled.Attributes[attrWithdrawn] = "one,two"
	q.hearCancel(t.Context(), cancelled)
	if !w.covers("two", now.Add(time.Minute)) || w.covers("three", now) {
		t.Error("the publications that were named are not those that are covered")
	}
}

func TestFIFO(t *testing.T) {
	f := newFIFO[int](3)
	for i := range 1000 {
		f.put(strconv.Itoa(i%7), i)
		if i%5 == 0 {
			f.remove(strconv.Itoa(i % 7))
		}
		if len(f.m) > 3 || len(f.order) > 100 {
			t.Fatalf("after %d: %d keys, %d places", i, len(f.m), len(f.order))
		}
	}
	f = newFIFO[int](2)
	f.put("a", 1)
	f.put("b", 2)
	f.put("a", 3)
	f.put("c", 4)
	if _, ok := f.get("a"); ok {
		t.Error("the oldest is still there")
	}
	if v, ok := f.get("b"); !ok || v != 2 {
		t.Errorf("b is %d, %v", v, ok)
	}
}

// A lease that lapsed by the wall's clock is lost, though the machine slept and
// the monotonic clock stood still.
func TestLease_valid_bothClocks(t *testing.T) {
	now := time.Now()
	for name, tc := range map[string]struct {
		until time.Time
		want  bool
	}{
		"both ahead":  {now.Add(time.Hour), true},
		"both behind": {now.Add(-time.Second), false},
		"no reading of the monotonic clock, behind": {now.Add(-time.Second).Round(0), false},
	} {
		if got := (&lease{until: tc.until}).valid(); got != tc.want {
			t.Errorf("%s: valid is %v, want %v", name, got, tc.want)
		}
	}
	if (&lease{until: now.Add(time.Hour), over: true}).valid() {
		t.Error("a lease that has ended is valid")
	}
}

// Whatever comes from a topic is read without harm.
func FuzzMessages(f *testing.F) {
	data, err := proto.Marshal(&queuepb.Job{Operation: "a", ReplyTo: "api", Pool: "p"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data, "0", "1", "", "x,y")
	f.Add([]byte("\xff"), "-1", "", "attempts", "")
	q := idle(f)
	f.Fuzz(func(t *testing.T, data []byte, base, seq, reason, withdrawn string) {
		m := &pb.PubsubMessage{Data: data, MessageId: "m", Attributes: map[string]string{
			attrBase: base, attrSeq: seq, attrReason: reason, attrWithdrawn: withdrawn, attrOperation: "a",
		}}
		q.fresh(m)
		q.hearCancel(context.Background(), m)
		l, err := q.newLease("s", &pb.ReceivedMessage{Message: m, DeliveryAttempt: int32(len(data))}) //nolint:gosec // small
		if l == nil {
			t.Fatal("no lease")
		}
		if err == nil && l.base > 1<<31 {
			t.Errorf("base is %d", l.base)
		}
	})
}

// A listener hears each notice once, and of a worker nothing older than what it
// has heard.
func TestQueue_freshNotice(t *testing.T) {
	q := idle(t)
	worker := func(name string, running int32) *queuepb.Notice {
		return &queuepb.Notice{About: &queuepb.Notice_Worker{Worker: &queuepb.WorkerState{Worker: name, Running: running}}}
	}
	cancellation := &queuepb.Notice{About: &queuepb.Notice_Cancellation{Cancellation: &queuepb.Cancellation{Operation: "a"}}}
	heard := newFIFO[int64](100)
	for i, tc := range []struct {
		id, process string
		seq         int
		notice      *queuepb.Notice
		want        bool
	}{
		{"m1", "p", 2, worker("w", 1), true},
		{"m1", "p", 2, worker("w", 1), false}, // twice
		{"m2", "p", 1, worker("w", 0), false}, // older
		{"m3", "p", 3, worker("w", 2), true},
		{"m4", "p", 1, worker("other", 0), true},
		{"m5", "q", 1, worker("w", 0), true}, // another process has the name now
		{"m6", "p", 1, cancellation, true},
		{"m7", "p", 0, cancellation, true},
		{"m6", "p", 1, cancellation, false}, // twice
	} {
		data, err := proto.Marshal(tc.notice)
		if err != nil {
			t.Fatal(err)
		}
		n := q.freshNotice(heard, &pb.PubsubMessage{MessageId: tc.id, Data: data, Attributes: map[string]string{
			attrProcess: tc.process, attrSeq: strconv.Itoa(tc.seq),
		}})
		if (n != nil) != tc.want {
			t.Errorf("notice %d, %s: passed on is %v, want %v", i, tc.id, n != nil, tc.want)
		}
	}
}
