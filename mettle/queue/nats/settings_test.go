package nats_test

import (
	"testing"

	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/mettle-build/mettle/mettle/queue/nats"
)

// A process that is started without the settings that Setup was run with leaves the
// streams as they are: who forgets replicas=3 at one worker must not take the copies
// of all jobs away.
func TestNew_keepsSettings(t *testing.T) {
	t.Parallel()
	b := newBroker(t, nil)
	if err := nats.Setup(t.Context(), nats.Options{Servers: []string{b.url()}, Prefix: "kept", MaxJobs: 77}); err != nil {
		t.Fatal(err)
	}
	newQueue(t, b, func(o *nats.Options) { o.Prefix = "kept" })
	nc, err := natsgo.Connect(b.url())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), "kept_jobs")
	if err != nil {
		t.Fatal(err)
	}
	if got := s.CachedInfo().Config.MaxMsgs; got != 77 {
		t.Errorf("the stream of jobs takes %d after a process came with other settings, want 77", got)
	}
}
