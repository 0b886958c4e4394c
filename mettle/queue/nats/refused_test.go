package nats_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/nats"
)

// What only an operator can change is told from a broker that is away.
func TestNew_refused(t *testing.T) {
	allowed := &server.Permissions{
		Publish:   &server.SubjectPermission{Allow: []string{"mettle.>"}},
		Subscribe: &server.SubjectPermission{Allow: []string{"_INBOX.>"}},
	}
	guarded := newBroker(t, func(o *server.Options) {
		o.Users = []*server.User{{Username: "u", Password: "p"}, {Username: "nobody", Password: "p", Permissions: allowed}}
	})
	gone := newBroker(t, nil)
	gone.stop()
	for _, tc := range []struct {
		name   string
		o      nats.Options
		refuse bool
	}{
		{"wrong password", nats.Options{Servers: []string{guarded.url()}, User: "u", Password: "wrong"}, true},
		{"no right to make streams", nats.Options{Servers: []string{guarded.url()}, User: "nobody", Password: "p"}, true},
		{"no streams", nats.Options{Servers: []string{guarded.url()}, User: "u", Password: "p", MustExist: true}, true},
		{"nobody there", nats.Options{Servers: []string{gone.url()}}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.o.Timeout = time.Second
			q, err := nats.New(t.Context(), tc.o)
			if err == nil {
				t.Fatal("no error", q.Close())
			}
			if !errors.Is(err, queue.ErrUnavailable) || errors.Is(err, queue.ErrRefused) != tc.refuse {
				t.Errorf("error %v, want ErrUnavailable, and ErrRefused: %v", err, tc.refuse)
			}
		})
	}
}

// A broker that refuses us for a while, because its users are being changed or its
// accounts have not been loaded yet, is tried for as long as it takes.
func TestQueue_refusedForAWhile(t *testing.T) {
	t.Parallel()
	b := newBroker(t, func(o *server.Options) { o.Username, o.Password = "fleet", "secret" })
	q := newQueue(t, b, func(o *nats.Options) {
		o.User, o.Password, o.Timeout = "fleet", "secret", 2*time.Second
	})
	eventually := func(what string, f func() error) {
		t.Helper()
		for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
			err := f()
			if err == nil {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: %v", what, err)
			}
		}
	}
	b.stop()
	b.opts.Password = "changed"
	b.start(t)
	eventually("refused several times", func() error {
		v, err := b.srv.Varz(nil)
		if err == nil && v.TotalConnections < 5 {
			err = fmt.Errorf("%d connections were tried", v.TotalConnections)
		}
		return err
	})
	b.stop()
	b.opts.Password = "secret"
	b.start(t)
	eventually("ready", func() error { return q.Ready(t.Context()) })
}
