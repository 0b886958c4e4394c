package nats_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/mettle-build/mettle/mettle/queue/nats"
)

// A power failure takes from a single server what it had not yet brought to its
// disk, a job that it had acknowledged among it: its client is told to ask again.
func TestQueue_brokerLosesTheLast(t *testing.T) {
	t.Parallel()
	b := newBroker(t, nil)
	quick := func(o *nats.Options) { o.Prefix, o.Timeout, o.LeaseTime = "tail", 15*time.Second, 10*time.Second }
	api := newQueue(t, b, quick)
	updates := receive(t, api)
	mustPublish(t, api, "early")
	b.stop()
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.CopyFS(disk, os.DirFS(b.opts.StoreDir)); err != nil {
		t.Fatal(err)
	}
	b.start(t)
	mustPublish(t, api, "late")
	b.stop()
	b.opts.StoreDir = disk
	b.start(t)
	awaitUnavailable(t, updates, "late")
	mustLease(t, api, "early", 1)
	select {
	case u := <-updates:
		t.Errorf("%v, want nothing of a job that is there", u)
	default:
	}
}
