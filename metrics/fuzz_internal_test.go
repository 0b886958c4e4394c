package metrics

import (
	"net/netip"
	"strings"
	"testing"
)

// FuzzHost: a page of the Internet that a browser shows has a name with a dot in it,
// and by that name nobody gets in.
func FuzzHost(f *testing.F) {
	for _, s := range []string{"localhost:7779", "127.0.0.1:7779", "[::1]:7779", "worker-1", "evil.example:7779", "evil.example.", "127.0.0.1.evil.example", "[evil.example]", "a.localhost", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, host string) {
		if strings.ContainsAny(host, ":[]%") {
			_ = ours(host)
			return
		}
		for _, name := range []string{host, host + ":7779"} {
			if got := ours(name); got && len(strings.Split(strings.TrimSuffix(host, "."), ".")) > 1 && !strings.HasSuffix(strings.ToLower(strings.TrimSuffix(host, ".")), ".localhost") {
				if _, err := netip.ParseAddr(strings.TrimSuffix(host, ".")); err != nil {
					t.Errorf("%q is taken for a name of ours", name)
				}
			}
		}
		if loopback(host) {
			t.Errorf("%q, without a port, is taken for an address", host)
		}
	})
}
