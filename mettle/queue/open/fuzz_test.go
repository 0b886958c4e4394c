package open_test

import (
	"strings"
	"testing"

	"github.com/mettle-build/mettle/mettle/queue/open"
)

// FuzzParseURL: the address of a queue is read or refused, and neither way a password
// is repeated.
func FuzzParseURL(f *testing.F) {
	for _, s := range []string{"nats://", "tls://", "gcppubsub://", "mem://", ""} {
		f.Add(s, "h:4222/x?lease=1m")
		f.Add(s, "project/prefix?attempts=3&pools=a,b&bands=false")
	}
	f.Add("gcppubsub://", "%zz")
	f.Add("/", "0")
	f.Add("nats://", "h:99999999")
	f.Fuzz(func(t *testing.T, scheme, rest string) {
		const password = "s3cr3t"
		if strings.Contains(scheme+rest, password) || strings.ContainsAny(scheme, "?#") {
			return
		}
		u, err := open.ParseURL(scheme + "user:" + password + "@" + rest)
		if err == nil && (u == nil || u.LeaseTime() <= 0) {
			t.Fatalf("%s%s is read as %+v", scheme, rest, u)
		}
		text := ""
		if err == nil {
			text = u.String()
		} else {
			text = err.Error()
		}
		if strings.Contains(text, password) {
			t.Errorf("%s...@%s is told of as %s", scheme, rest, text)
		}
	})
}
