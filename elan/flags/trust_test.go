package flags_test

import (
	"net"
	"os"
	"testing"

	"github.com/mettle-build/mettle/elan/flags"
)

// TestReachable: what a server prints is what a client can call.
func TestReachable(t *testing.T) {
	host, err := os.Hostname()
	if err != nil || host == "" {
		host = "localhost"
	}
	tcp := func(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 7778} }
	for name, tc := range map[string]struct {
		addr net.Addr
		want string
	}{
		"loopback":              {tcp("127.0.0.1"), "127.0.0.1:7778"},
		"loopback of IPv6":      {tcp("::1"), "[::1]:7778"},
		"one address":           {tcp("192.168.1.1"), "192.168.1.1:7778"},
		"all addresses":         {tcp("0.0.0.0"), net.JoinHostPort(host, "7778")},
		"all addresses of IPv6": {tcp("::"), net.JoinHostPort(host, "7778")},
		"none":                  {&net.TCPAddr{Port: 7778}, net.JoinHostPort(host, "7778")},
		"no TCP":                {&net.UnixAddr{Name: "/x"}, "/x"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := flags.Reachable(tc.addr); got != tc.want {
				t.Errorf("%q, want %q", got, tc.want)
			}
		})
	}
	if got, want := (flags.Trust{TLSCert: "c", TLSKey: "k"}).Address(tcp("::")), "grpcs://"+net.JoinHostPort(host, "7778"); got != want {
		t.Errorf("with TLS %q, want %q", got, want)
	}
}
