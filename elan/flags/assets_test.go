package flags_test

import (
	"net"
	"testing"

	"github.com/mettle-build/mettle/elan/flags"
)

func TestAssets_Served(t *testing.T) {
	tcp := func(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 1} }
	for _, tc := range []struct {
		name, mode string
		addr       net.Addr
		want       bool
	}{
		{"loopback", "auto", tcp("127.0.0.1"), true},
		{"loopback of IPv6", "auto", tcp("::1"), true},
		{"all addresses", "auto", tcp("0.0.0.0"), false},
		{"all addresses of IPv6", "auto", tcp("::"), false},
		{"a network", "auto", tcp("192.168.1.1"), false},
		{"something else", "auto", &net.UnixAddr{Name: "/x"}, false},
		{"on", "on", tcp("0.0.0.0"), true},
		{"off", "off", tcp("127.0.0.1"), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := (flags.Assets{Assets: tc.mode}).Served(tc.addr); got != tc.want {
				t.Errorf("%v, want %v", got, tc.want)
			}
		})
	}
}
