package pubsub_test

import (
	"bytes"
	"net/url"
	"testing"
	"time"

	"cloud.google.com/go/pubsub/v2/pstest"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/queue/pubsub"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func TestParseURL(t *testing.T) {
	for _, tc := range []struct {
		url  string
		want pubsub.Options
		ok   bool
	}{
		{"gcppubsub://my-project/mettle", pubsub.Options{Project: "my-project", Prefix: "mettle"}, true},
		{
			"gcppubsub://p/x?lease=90s&attempts=5&bands=false&pools=a,b",
			pubsub.Options{Project: "p", Prefix: "x", LeaseTime: 90 * time.Second, MaxAttempts: 5, OneBand: true, Pools: []string{"a", "b"}},
			true,
		},
		{"gcppubsub://p/x?bands=true", pubsub.Options{Project: "p", Prefix: "x"}, true},
		{"gcppubsub://p", pubsub.Options{}, false},
		{"gcppubsub:///x", pubsub.Options{}, false},
		{"gcppubsub://p/a/b", pubsub.Options{}, false},
		{"gcppubsub://p/goog", pubsub.Options{}, false},
		{"gcppubsub://p/x?lease=5s", pubsub.Options{}, false},
		{"gcppubsub://p/x?lease=601s", pubsub.Options{}, false},
		{"gcppubsub://p/x?lease=10500ms", pubsub.Options{}, false},
		{"gcppubsub://p/x?attempts=51", pubsub.Options{}, false},
		{"gcppubsub://p/x?attempts=-1", pubsub.Options{}, false},
		{"gcppubsub://p/x?retries=1", pubsub.Options{}, false},
		{"nats://p/x", pubsub.Options{}, false},
	} {
		u, err := url.Parse(tc.url)
		if err != nil {
			t.Fatal(err)
		}
		got, err := pubsub.ParseURL(u)
		if (err == nil) != tc.ok {
			t.Errorf("ParseURL(%s): %v", tc.url, err)
			continue
		}
		if d := cmp.Diff(tc.want, got, cmpopts.IgnoreUnexported(pubsub.Options{})); d != "" {
			t.Errorf("ParseURL(%s) differs (-want +got):\n%s", tc.url, d)
		}
	}
}

// What is too large for a message is left to the CAS.
func TestQueue_largeMessages(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	o := options(s)
	o.LeaseTime = 60 * time.Second
	f := newFleet(t, s, o)
	e := receiveEnds(t, f)
	j := job("a")
	j.Action, j.Command = []byte("action"), make([]byte, 12<<20)
	if err := f.Publish(t.Context(), j); err != nil {
		t.Fatal(err)
	}
	l, err := f.Lease(t.Context(), []string{"p"})
	if err != nil {
		t.Fatal(err)
	}
	if got := l.Job(); len(got.GetAction()) > 0 || len(got.GetCommand()) > 0 || got.GetOperation() != "a" {
		t.Errorf("leased a job of %d bytes", proto.Size(got))
	}
	if len(j.GetCommand()) != 12<<20 {
		t.Error("the published job was changed")
	}
	out := &repb.Digest{Hash: "h", SizeBytes: 12 << 20}
	inlined := &repb.ExecuteResponse{Result: &repb.ActionResult{StdoutDigest: out, StdoutRaw: bytes.Repeat([]byte("x"), 12<<20), ExitCode: 3}}
	huge := &repb.ExecuteResponse{Message: string(bytes.Repeat([]byte("x"), 12<<20))}
	for name, res := range map[string]*repb.ExecuteResponse{"a": inlined, "b": huge} {
		data, err := proto.Marshal(res)
		if err != nil {
			t.Fatal(err)
		}
		u := &queuepb.Update{Operation: name, Attempt: 1, Worker: "w", Stage: queuepb.Update_COMPLETED, ExecuteResponse: data}
		if err := f.SendUpdate(t.Context(), "api", u); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		u := e.next(t, patience)
		var res repb.ExecuteResponse
		if err := proto.Unmarshal(u.GetExecuteResponse(), &res); err != nil {
			t.Fatal(err)
		}
		switch u.GetOperation() {
		case "a":
			if r := res.GetResult(); r.GetExitCode() != 3 || len(r.GetStdoutRaw()) > 0 || r.GetStdoutDigest().GetSizeBytes() != 12<<20 {
				t.Errorf("the result arrived as %d bytes, exit code %d", proto.Size(r), r.GetExitCode())
			}
		case "b":
			if res.GetStatus().GetCode() != int32(code.Code_RESOURCE_EXHAUSTED) {
				t.Errorf("a result too large for a message ended as %v", res.GetStatus())
			}
		}
	}
	if err := l.Ack(t.Context()); err != nil {
		t.Error(err)
	}
}

// Over pstest as it is, found by the environment, everything works as well.
func TestQueue_emulatorHost(t *testing.T) {
	fake := pstest.NewServer()
	defer func() {
		fake.Close()
		fake.Wait()
	}()
	t.Setenv("PUBSUB_EMULATOR_HOST", fake.Addr)
	q := newQueue(t, pubsub.Options{Project: "project", Prefix: "test", LeaseTime: 10 * time.Second, Pools: []string{"p"}, OneBand: true})
	if err := q.Setup(t.Context()); err != nil {
		t.Fatal(err)
	}
	e := receiveEnds(t, q)
	if err := q.Publish(t.Context(), job("a")); err != nil {
		t.Fatal(err)
	}
	l, err := q.Lease(t.Context(), []string{"p"})
	if err != nil {
		t.Fatal(err)
	}
	if err := q.SendUpdate(t.Context(), "api", &queuepb.Update{Operation: "a", Attempt: l.Attempt(), Stage: queuepb.Update_COMPLETED}); err != nil {
		t.Fatal(err)
	}
	if err := l.Ack(t.Context()); err != nil {
		t.Fatal(err)
	}
	if u := e.next(t, patience); u.GetOperation() != "a" {
		t.Errorf("ended: %v", u)
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	o := options(s)
	reg := prometheus.NewRegistry()
	o.Registerer = reg
	q := newQueue(t, o)
	if err := q.Setup(t.Context()); err != nil {
		t.Fatal(err)
	}
	problems, err := testutil.GatherAndLint(reg)
	if err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
	if n, err := testutil.GatherAndCount(reg, "mettle_pubsub_calls_total"); err != nil || n < 4 {
		t.Errorf("%d kinds of calls counted, %v", n, err)
	}
	if _, err := pubsub.New(t.Context(), o); err == nil {
		t.Error("two queues registered the same metrics")
	}
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	newQueue(t, o) // they are free again
}
