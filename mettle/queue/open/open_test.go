package open_test

import (
	"strings"
	"testing"
	"time"

	"github.com/mettle-build/mettle/mettle/queue/open"
)

func TestParseURL(t *testing.T) {
	for _, tc := range []struct {
		name, url string
		text      string
		lease     time.Duration
	}{
		{"nats", "nats://broker:4222/fleet", "nats://broker:4222/fleet", 30 * time.Second},
		{"a user and settings", "nats://u:secret@a,b:4223/p?lease=20s", "nats://a,b:4223/p", 20 * time.Second},
		{"a token", "tls://secret@broker", "tls://broker", 30 * time.Second},
		{"pub/sub", "gcppubsub://project/prefix", "gcppubsub://project/prefix", time.Minute},
		{"pub/sub with settings", "gcppubsub://project/prefix?lease=90s", "gcppubsub://project/prefix", 90 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			u, err := open.ParseURL(tc.url)
			if err != nil {
				t.Fatal(err)
			}
			if u.String() != tc.text || u.LeaseTime() != tc.lease {
				t.Errorf("%s with a lease of %v, want %s and %v", u, u.LeaseTime(), tc.text, tc.lease)
			}
		})
	}
}

func TestParseURL_wrong(t *testing.T) {
	for _, tc := range []struct {
		name, url string
		want      string // in the error
	}{
		{"nothing", "", "nats://HOST:4222/PREFIX"},
		{"no URL", "broker:4222", "no URL"},
		{"no URL, a password", "u:secret@broker:4222", "no URL"},
		{"another broker", "amqp://u:secret@broker", "no queue of the kind amqp://, want nats://"},
		{"memory", "mem://", "within one process"},
		{"nats without a host", "nats://", "HOST:PORT"},
		{"nats with a wrong setting", "nats://u:secret@broker?leases=1s", "leases"},
		{"nats with a wrong user", "nats://%zzsecret:x@broker", "escaped"},
		{"pub/sub without a prefix", "gcppubsub://project", "gcppubsub://PROJECT/PREFIX"},
		{"pub/sub with a wrong setting", "gcppubsub://project/prefix?lease=1ms", "lease"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := open.ParseURL(tc.url)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want an error with %q", err, tc.want)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("the error tells a secret: %v", err)
			}
		})
	}
}
