package asset_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/asset"
)

func TestGuard(t *testing.T) {
	g := asset.NewGuard([]netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00:1::/32")})
	g.SetOwn(func() ([]net.Addr, error) {
		_, n, err := net.ParseCIDR("8.8.4.4/32")
		return []net.Addr{n}, err
	})
	for addr, want := range map[string]bool{
		"8.8.8.8": true, "1.1.1.1": true, "172.32.0.1": true, "100.128.0.1": true, "192.0.1.1": true, "223.255.255.255": true,
		"2606:4700::1111": true, "2001:4860:4860::8888": true,
		"10.1.2.3": true, "::ffff:10.1.2.3": true, "fd00:1::1": true, // allowed
		"8.8.4.4": false, "::ffff:8.8.4.4": false, // this machine
		"10.2.0.1": false, "fd00:2::1": false,
		"0.0.0.0": false, "0.1.2.3": false, "127.0.0.1": false, "127.255.255.255": false, "169.254.169.254": false, "172.16.0.1": false,
		"172.31.255.255": false, "192.168.0.1": false, "100.64.0.1": false, "100.100.100.200": false, "192.0.0.1": false, "192.0.2.1": false,
		"198.18.0.1": false, "198.19.255.255": false, "198.51.100.1": false, "203.0.113.1": false, "192.88.99.1": false,
		"224.0.0.1": false, "239.255.255.255": false, "240.0.0.1": false, "255.255.255.255": false,
		"::": false, "::1": false, "::127.0.0.1": false, "::ffff:127.0.0.1": false, "::ffff:169.254.169.254": false, "::ffff:0:1": false,
		"fe80::1": false, "fe80::1%eth0": false, "fc00::1": false, "fd12:3456::1": false, "fec0::1": false, "ff02::1": false,
		"fd00:ec2::254": false, "100::1": false, "2001::1": false, "2001:db8::1": false, "3fff::1": false, "4000::1": false,
		"64:ff9b::8.8.8.8": true, "64:ff9b::127.0.0.1": false, "64:ff9b::a9fe:a9fe": false, "64:ff9b:1::1": false, // NAT64
		"2002:808:808::1": true, "2002:7f00:1::1": false, "2002:a00:1::1": false, // 6to4
		"2001:0:53aa:64c::1": false, // Teredo
	} {
		err := g.Check(netip.MustParseAddr(addr))
		if (err == nil) != want || (err != nil && !errors.Is(err, asset.ErrForbidden)) {
			t.Errorf("%s: %v, want allowed %v", addr, err, want)
		}
	}
	if err := g.Check(netip.Addr{}); !errors.Is(err, asset.ErrForbidden) {
		t.Errorf("no address: %v", err)
	}
	g.SetOwn(func() ([]net.Addr, error) { return nil, errors.New("no idea") })
	if err := g.Check(netip.MustParseAddr("8.8.8.8")); !errors.Is(err, asset.ErrForbidden) {
		t.Errorf("without knowing this machine's addresses: %v", err)
	}
}

func TestGuard_Control(t *testing.T) {
	g := asset.NewGuard(nil)
	for _, tc := range [][2]string{
		{"tcp4", "127.0.0.1:80"}, {"tcp6", "[::1]:80"}, {"tcp6", "[fe80::1%lo]:80"}, {"udp4", "8.8.8.8:53"}, {"unix", "/var/run/docker.sock"}, {"tcp4", "localhost:80"},
	} {
		if err := g.Control(t.Context(), tc[0], tc[1], nil); !errors.Is(err, asset.ErrForbidden) {
			t.Errorf("%v: %v, want ErrForbidden", tc, err)
		}
	}
}

// only allows one address of loopback, where public stands for the Internet.
func only(addr string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(addr + "/32")} }

// listenAt serves at an address of loopback.
func listenAt(t *testing.T, addr string, h http.HandlerFunc) *site {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", addr+":0")
	if err != nil {
		t.Skipf("no address %s here: %v", addr, err)
	}
	s := newSite(t, h)
	s.Close()
	s.Server = httptest.NewUnstartedServer(s.Config.Handler)
	s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(s.Close)
	return s
}

// TestFetch_private: nothing is fetched from inside, whatever leads there.
func TestFetch_private(t *testing.T) {
	inside := listenAt(t, "127.0.0.1", serving("the keys"))
	port := inside.Listener.Addr().(*net.TCPAddr).Port
	outside := listenAt(t, "127.0.0.2", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, inside.URL, http.StatusFound)
	})
	a := newService(t, nil, asset.Options{AllowPrivate: only("127.0.0.2")})
	at := func(host string) string {
		return "http://" + net.JoinHostPort(host, strings.TrimPrefix(inside.URL, "http://127.0.0.1:")) + "/x"
	}
	for name, uri := range map[string]string{
		"by address":              at("127.0.0.1"),
		"by name":                 at("localhost"),
		"by a short address":      at("0"),
		"by a mapped address":     at("::ffff:127.0.0.1"),
		"by loopback of IPv6":     at("::1"),
		"by the unnamed address":  at("0.0.0.0"),
		"by the unnamed one of 6": at("::"),
		"by a redirect":           outside.URL,
	} {
		t.Run(name, func(t *testing.T) {
			_, err := a.FetchBlob(t.Context(), request(uri))
			f, ok := errors.AsType[*asset.FetchError](err)
			// A resolver may know nothing of short addresses.
			if !ok || (f.Reason != asset.Denied && name != "by a short address") {
				t.Errorf("%v, want Denied", err)
			}
			_, err = a.FetchDirectory(t.Context(), request(uri+"/repo.git"))
			if f, ok := errors.AsType[*asset.FetchError](err); !ok || (f.Reason != asset.Denied && name != "by a short address") {
				t.Errorf("git: %v, want Denied", err)
			}
		})
	}
	if n := len(inside.requests()); n != 0 {
		t.Errorf("%d requests came to port %d inside", n, port)
	}
	for _, uri := range []string{"file:///etc/passwd", "FILE:///etc/passwd", "ssh://git@host/repo.git", "git://host/repo.git", "ftp://host/x", "ext::sh -c id"} {
		_, err := a.FetchDirectory(t.Context(), request(uri, "resource_type", "application/x-git"))
		if f, ok := errors.AsType[*asset.FetchError](err); !ok || (f.Reason != asset.Denied && f.Reason != asset.NotFound) {
			t.Errorf("%s: %v, want a refusal", uri, err)
		}
	}
}

// TestFetch_rebinding: a name that leads outside when somebody looks, and inside
// when the connection is made.
func TestFetch_rebinding(t *testing.T) {
	inside := listenAt(t, "127.0.0.1", serving("the keys"))
	_, port, err := net.SplitHostPort(inside.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	o := asset.Options{AllowPrivate: only("127.0.0.2")}
	a := newService(t, nil, o)
	answers := make(chan [4]byte, 8)
	answers <- [4]byte{127, 0, 0, 2} // nobody listens there
	for range 7 {
		answers <- [4]byte{127, 0, 0, 1}
	}
	a.SetResolver(fakeDNS(answers), o)
	for range 2 {
		_, err := a.FetchBlob(t.Context(), request("http://rebind.example:"+port))
		if _, ok := errors.AsType[*asset.FetchError](err); !ok {
			t.Fatal(err)
		}
	}
	_, err = a.FetchBlob(t.Context(), request("http://rebind.example:"+port))
	wantReason(t, err, asset.Denied)
	if strings.Contains(err.Error(), "127.0.0.1") {
		t.Errorf("%q tells the address", err)
	}
	if n := len(inside.requests()); n != 0 {
		t.Errorf("%d requests came in", n)
	}
}

// fakeDNS answers each question for an IPv4 address with the next of answers, and
// has none for IPv6.
func fakeDNS(answers <-chan [4]byte) *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		client, server := net.Pipe()
		go func() {
			defer server.Close()
			// As over TCP, each message has its length before it.
			buf := make([]byte, 2048)
			n, err := server.Read(buf)
			if err != nil {
				return
			}
			if n == 2 {
				if n, err = server.Read(buf[2:]); err != nil {
					return
				}
				n += 2
			}
			reply, ok := answer(buf[2:n], answers)
			if !ok {
				return
			}
			_ = server.SetWriteDeadline(time.Now().Add(10 * time.Second))
			_, _ = server.Write(append([]byte{byte(len(reply) >> 8), byte(len(reply))}, reply...))
		}()
		return client, nil
	}}
}

// answer makes of a DNS query its answer (RFC 1035, 4): the header and the question
// again, and one address if that was asked for.
func answer(query []byte, answers <-chan [4]byte) ([]byte, bool) {
	const header = 12
	end := header
	for end < len(query) && query[end] != 0 {
		end += int(query[end]) + 1
	}
	if end += 5; end > len(query) { // the root's label, type and class
		return nil, false
	}
	reply := bytes.Clone(query[:end])
	reply[2], reply[3] = 0x84, 0 // an authoritative answer without an error
	copy(reply[6:], make([]byte, 6))
	if reply[end-3] == 1 { // type A
		ip := <-answers
		reply[7] = 1
		// The name is that of the question; type A, class IN, for 0 s, 4 bytes.
		reply = append(reply, 0xc0, header, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4)
		reply = append(reply, ip[:]...)
	}
	return reply, true
}
