package nats

import (
	"log/slog"
	"testing"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// rawMsg is a message of bytes that anybody may have sent.
type rawMsg struct {
	jetstream.Msg
	data []byte
}

func (m rawMsg) Data() []byte    { return m.data }
func (m rawMsg) Subject() string { return "s" }
func (m rawMsg) Metadata() (*jetstream.MsgMetadata, error) {
	return &jetstream.MsgMetadata{NumDelivered: 1}, nil
}

// FuzzMessages: what comes from the broker is what we would have sent, or dropped.
func FuzzMessages(f *testing.F) {
	for _, m := range []proto.Message{
		&queuepb.Update{Operation: "a", Attempt: 2, Stage: queuepb.Update_COMPLETED, ExecuteResponse: []byte("x")},
		&queuepb.Update{Operation: "a", Attempt: 1, Stage: queuepb.Update_EXECUTING, Worker: "w"},
		&queuepb.Job{Operation: "a", ReplyTo: "api"},
		&queuepb.Notice{About: &queuepb.Notice_Cancellation{Cancellation: &queuepb.Cancellation{Operation: "a"}}},
	} {
		data, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, "x.1", "404")
	}
	f.Add([]byte("\xff"), "", "")
	f.Fuzz(func(t *testing.T, data []byte, subject, status string) {
		q := &Queue{
			log: slog.New(slog.DiscardHandler), fences: map[string]uint32{"a": 1},
			watched: map[string]*watch{}, published: map[string]*watch{"a": {}},
		}
		if u := q.accept(rawMsg{data: data}, "api"); u != nil && u.GetOperation() == "a" && u.GetAttempt() <= 1 {
			t.Errorf("an update of a job that was withdrawn is taken: %v", u)
		}
		q.handleNotice(&natsgo.Msg{Data: data}, func(n *queuepb.Notice) {
			if n == nil {
				t.Error("no notice")
			}
		})
		in := &intake{q: q, requests: map[int]*source{}}
		in.answer(&natsgo.Msg{Subject: subject, Header: natsgo.Header{"Status": []string{status}}})
		if time.Since(in.heard) > time.Hour {
			t.Error("the broker was not heard")
		}
		if r, err := parseRecord(data); err == nil {
			_ = ended(r)
		}
	})
}
