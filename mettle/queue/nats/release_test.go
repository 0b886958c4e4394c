package nats_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/nats"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

//nolint:gochecknoglobals // a flag
var record = flag.String("record", "", "record what today's fleet leaves at the broker as that of this release")

// releaseDir has what fleets of each release left at a broker. It never changes.
const releaseDir = "testdata/releases"

// left is what a fleet has left at a broker, in streams named without the prefix.
type left struct {
	Streams   map[string]jetstream.StreamConfig
	Consumers map[string][]jetstream.ConsumerConfig
	Messages  map[string][]leftMessage
}

// A leftMessage is one in a stream.
type leftMessage struct {
	Sequence uint64
	Subject  string        // after the prefix
	Header   natsgo.Header `json:",omitempty"`
	Data     []byte
}

// leftStreams are the streams, without their prefix.
//
//nolint:gochecknoglobals // an immutable table
var leftStreams = []string{"jobs", "leases", "updates"}

// leftPrefix is that of the fleets which leave something.
const leftPrefix = "release"

// TestRecord records a release, if it is told to.
func TestRecord(t *testing.T) {
	if *record == "" {
		t.Skip("-record names no release")
	}
	path := filepath.Join(releaseDir, *record+".json")
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("%s was recorded (%v): what a release left does not change; record the next one", *record, err)
	}
	b := newBroker(t, nil)
	leave(t, b)
	text, err := json.MarshalIndent(look(t, b), "", " ")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.MkdirAll(releaseDir, 0o755), os.WriteFile(path, append(text, '\n'), 0o644)); err != nil { //nolint:gosec // part of the source
		t.Fatal(err)
	}
}

// leave has a fleet leave all that one may leave: jobs that wait, were rejected,
// released, withdrawn, shared, or have ended, and one that is with a worker.
func leave(t *testing.T, b *broker) {
	t.Helper()
	open := func(name string) *nats.Queue {
		return newQueue(t, b, func(o *nats.Options) { o.Prefix, o.Name, o.LeaseTime = leftPrefix, name, nats.DefaultLease })
	}
	api, other, worker := open("api"), open("other"), open("worker")
	take := func(name string, attempt uint32) queue.Lease {
		mustPublish(t, api, name)
		l := mustLease(t, worker, name, attempt)
		send(t, worker, name, attempt, queuepb.Update_EXECUTING)
		return l
	}
	ended := take("ended", 1)
	send(t, worker, "ended", 1, queuepb.Update_COMPLETED)
	err := ended.Ack(t.Context())
	take("runs", 1)
	take("withdrawn", 1)
	rejected, released := take("rejected", 1), take("released", 1)
	err = errors.Join(err, api.Cancel(t.Context(), "withdrawn"),
		rejected.Reject(t.Context(), "no room"), released.Release(t.Context()))
	mustPublish(t, api, "shared", "waits")
	urgent := job("urgent")
	urgent.Priority = -1
	shared := job("shared")
	shared.ReplyTo = "other api"
	if err = errors.Join(err, api.Publish(t.Context(), urgent), other.Publish(t.Context(), shared)); err != nil {
		t.Fatal(err)
	}
}

func send(t *testing.T, q *nats.Queue, name string, attempt uint32, stage queuepb.Update_Stage) {
	t.Helper()
	u := &queuepb.Update{Operation: name, Attempt: attempt, Worker: "worker", Stage: stage}
	if stage == queuepb.Update_COMPLETED {
		u.ExecuteResponse = []byte("response")
	}
	if err := q.SendUpdate(t.Context(), "api", u); err != nil {
		t.Fatal(err)
	}
}

func jetStream(t *testing.T, b *broker) jetstream.JetStream {
	t.Helper()
	nc, err := natsgo.Connect(b.url())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return js
}

// look reads what is at a broker.
func look(t *testing.T, b *broker) left {
	t.Helper()
	l := left{map[string]jetstream.StreamConfig{}, map[string][]jetstream.ConsumerConfig{}, map[string][]leftMessage{}}
	js := jetStream(t, b)
	for _, name := range leftStreams {
		s, err := js.Stream(t.Context(), leftPrefix+"_"+name)
		if err != nil {
			t.Fatal(err)
		}
		config := s.CachedInfo().Config
		config.Metadata = nil // the server's own
		l.Streams[name] = config
		consumers := s.ListConsumers(t.Context())
		for c := range consumers.Info() {
			c.Config.Metadata = nil
			l.Consumers[name] = append(l.Consumers[name], c.Config)
		}
		if err := consumers.Err(); err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(l.Consumers[name], func(a, b jetstream.ConsumerConfig) int { return strings.Compare(a.Durable, b.Durable) })
		for n := max(1, s.CachedInfo().State.FirstSeq); n <= s.CachedInfo().State.LastSeq; n++ {
			m, err := s.GetMsg(t.Context(), n)
			if errors.Is(err, jetstream.ErrMsgNotFound) {
				continue
			} else if err != nil {
				t.Fatal(err)
			}
			m.Header.Del(jetstream.ExpectedLastSubjSeqHeader)
			l.Messages[name] = append(l.Messages[name], leftMessage{n, strings.TrimPrefix(m.Subject, leftPrefix+"."), m.Header, m.Data})
		}
	}
	return l
}

// restore puts what was left at a broker, at the same places in the streams.
func (l left) restore(t *testing.T, b *broker) {
	t.Helper()
	js := jetStream(t, b)
	for _, name := range leftStreams {
		s, err := js.CreateStream(t.Context(), l.Streams[name])
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range l.Consumers[name] {
			if _, err := s.CreateConsumer(t.Context(), c); err != nil {
				t.Fatal(err)
			}
		}
		next := uint64(1)
		for _, m := range l.Messages[name] {
			for ; next < m.Sequence; next++ { // what was there has gone
				filler := strings.Join(strings.Split(m.Subject, ".")[:max(1, strings.Count(m.Subject, "."))], ".") + fmt.Sprint(".gone", next)
				if _, err := js.Publish(t.Context(), leftPrefix+"."+filler, nil); err != nil {
					t.Fatal(err)
				}
				if err := s.DeleteMsg(t.Context(), next); err != nil {
					t.Fatal(err)
				}
			}
			got, err := js.PublishMsg(t.Context(), &natsgo.Msg{Subject: leftPrefix + "." + m.Subject, Header: m.Header, Data: m.Data})
			if err != nil || got.Sequence != m.Sequence {
				t.Fatalf("%s: put at %v, %v; want %d", m.Subject, got, err, m.Sequence)
			}
			next++
		}
	}
}

// TestRelease: a fleet of today takes over what one of each release has left, with
// and without mettle setup in between.
func TestRelease(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob(releaseDir + "/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no release is recorded: %v", err)
	}
	for _, path := range files {
		for _, setup := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s,setup=%v", strings.TrimSuffix(filepath.Base(path), ".json"), setup), func(t *testing.T) {
				t.Parallel()
				var l left
				text, err := os.ReadFile(path)
				if err == nil {
					err = json.Unmarshal(text, &l)
				}
				if err != nil {
					t.Fatal(err)
				}
				b := newBroker(t, nil)
				if setup { // so that there is something to change
					jobs := l.Streams["jobs"]
					jobs.MaxMsgs = 77
					l.Streams["jobs"], l.Consumers["jobs"][0].AckWait = jobs, time.Minute
				}
				l.restore(t, b)
				if setup {
					setUpLeft(t, b, l)
				}
				takeOver(t, b, l)
			})
		}
	}
}

// setUpLeft runs Setup, which is to change only the settings, to those of today.
func setUpLeft(t *testing.T, b *broker, l left) {
	t.Helper()
	set := func(b *broker) {
		if err := nats.Setup(t.Context(), nats.Options{Servers: []string{b.url()}, Prefix: leftPrefix}, "p"); err != nil {
			t.Fatal(err)
		}
	}
	set(b)
	set(b) // it may run again at any time
	fresh := newBroker(t, nil)
	set(fresh)
	is, want := look(t, b), look(t, fresh)
	if diff := cmp.Diff(want.Streams, is.Streams); diff != "" {
		t.Errorf("the streams after setup (-new ones +these):\n%s", diff)
	}
	if diff := cmp.Diff(want.Consumers["jobs"], is.Consumers["jobs"]); diff != "" {
		t.Errorf("the consumers after setup (-new ones +these):\n%s", diff)
	}
	if diff := cmp.Diff(l.Messages, is.Messages, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("setup changed messages (-before +after):\n%s", diff)
	}
}

// takeOver is the life of a fleet that comes upon what was left.
func takeOver(t *testing.T, b *broker, l left) {
	t.Helper()
	open := func(name string) *nats.Queue {
		return newQueue(t, b, func(o *nats.Options) {
			// What runs does not lapse while the machine is slow.
			o.Prefix, o.Name, o.LeaseTime, o.MustExist = leftPrefix, name, 20*nats.DefaultLease, true
		})
	}
	api, worker := open("api"), open("worker")
	updates := receive(t, api)
	for _, m := range l.Messages["updates"] {
		if !strings.HasPrefix(m.Subject, "updates.api.") {
			continue
		}
		want := &queuepb.Update{}
		if err := proto.Unmarshal(m.Data, want); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, await(t, updates, want.GetOperation(), want.GetStage()), protocmp.Transform()); diff != "" {
			t.Errorf("an update that was left (-sent +received):\n%s", diff)
		}
	}
	// One more asks for what runs, and is told; and one that was withdrawn is a new job.
	mustPublish(t, api, "runs", "withdrawn")
	if u := await(t, updates, "runs", queuepb.Update_EXECUTING); u.GetAttempt() != 1 || u.GetWorker() != "worker" {
		t.Errorf("of what runs, a server that asks is told %v", u)
	}
	// All but what runs are to be had, each with the attempt that is next.
	want := map[string]uint32{"urgent": 1, "waits": 1, "shared": 1, "rejected": 2, "released": 2, "withdrawn": 2}
	got := map[string]uint32{}
	for range want {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		lease, err := worker.Lease(ctx, []string{"p"})
		cancel()
		if err != nil {
			t.Fatalf("after %v: %v", got, err)
		}
		got[lease.Job().GetOperation()] = lease.Attempt()
		if len(got) == 1 && got["urgent"] == 0 {
			t.Errorf("%v came before what is urgent", got)
		}
		send(t, worker, lease.Job().GetOperation(), lease.Attempt(), queuepb.Update_COMPLETED)
		if err := lease.Ack(t.Context()); err != nil {
			t.Error(err)
		}
		if u := await(t, updates, lease.Job().GetOperation(), queuepb.Update_COMPLETED); u.GetAttempt() != lease.Attempt() {
			t.Errorf("the end is told as %v", u)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("leased, with attempts (-want +got):\n%s", diff)
	}
}
