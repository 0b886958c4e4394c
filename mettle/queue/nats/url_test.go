package nats_test

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/mettle-build/mettle/mettle/queue/nats"
)

func TestParseURL(t *testing.T) {
	for _, tc := range []struct {
		url  string
		want nats.Options
	}{
		{"nats://host", nats.Options{Servers: []string{"nats://host:4222"}}},
		{"nats://host:1/", nats.Options{Servers: []string{"nats://host:1"}}},
		{"tls://a:1,b/ci?replicas=3&lease=45s", nats.Options{
			Servers: []string{"tls://a:1", "tls://b:4222"}, Prefix: "ci", Replicas: 3, LeaseTime: 45 * time.Second,
		}},
		{"nats://u:p%40ss@[::1]:4222,[::2]/x", nats.Options{
			Servers: []string{"nats://[::1]:4222", "nats://[::2]:4222"}, Prefix: "x", User: "u", Password: "p@ss",
		}},
		{"nats://secret@h", nats.Options{Servers: []string{"nats://h:4222"}, Token: "secret"}},
		{"nats://h?attempts=5&max_jobs=7&max_bytes=9&updates_age=2h&timeout=1s&heartbeat=2s&credentials=/f&ca=/ca&cert=/c&key=/k&domain=hub&memory=true&must_exist=true", nats.Options{
			Servers: []string{"nats://h:4222"}, MaxAttempts: 5, MaxJobs: 7, MaxBytes: 9, UpdatesAge: 2 * time.Hour,
			Timeout: time.Second, Heartbeat: 2 * time.Second, CredentialsFile: "/f", CAFile: "/ca", CertFile: "/c", KeyFile: "/k", Domain: "hub",
			Memory: true, MustExist: true,
		}},
	} {
		got, err := nats.ParseURL(tc.url)
		if err != nil {
			t.Errorf("%s: %v", tc.url, err)
			continue
		}
		if d := cmp.Diff(tc.want, got, cmpopts.IgnoreTypes(&slog.Logger{})); d != "" {
			t.Errorf("%s (-want +got):\n%s", tc.url, d)
		}
	}
}

func TestParseURL_refuses(t *testing.T) {
	for _, u := range []string{
		"", "host:4222", "http://host", "nats://", "nats://,a", "nats://a:0", "nats://a:70000", "nats://a/b/c", "nats://a/b.c",
		"nats://a/*", "nats://a?lease=10", "nats://a?lease=-1s", "nats://a?nothing=1", "nats://a?replicas=1&replicas=3",
		"nats://a?replicas=9", "nats://%zzsecret:x@a", "nats://:secret@a", "nats://a?%zz", "nats://a?attempts=-1",
		"nats://a?cert=/c", "nats://a?key=/k", "nats://a?domain=a.b",
	} {
		if o, err := nats.ParseURL(u); err == nil {
			t.Errorf("%q was taken for %+v", u, o)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("the error on %q tells the secret: %v", u, err)
		}
	}
}

func FuzzParseURL(f *testing.F) {
	f.Add("nats://u:p@h:1,h2/x?replicas=3")
	f.Fuzz(func(t *testing.T, s string) {
		o, err := nats.ParseURL(s)
		if err == nil && len(o.Servers) == 0 {
			t.Errorf("no server in %q", s)
		}
	})
}
