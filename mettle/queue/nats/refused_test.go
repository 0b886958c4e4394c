package nats_test

import (
	"errors"
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
