package asset

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
)

// ErrForbidden is wrapped by the errors about addresses that may not be dialled.
var ErrForbidden = errors.New("address is not public")

// Guard keeps connections away from what is not on the public Internet: this
// machine, its networks, and the services by which clouds give out credentials.
// Its Control looks at the very address that is about to be connected to, after
// names were resolved, so that it makes no difference how an address came about.
// It is immutable, and safe for concurrent use.
type Guard struct {
	allowed []netip.Prefix
	// own lists this machine's addresses: a firewall that keeps others from a port
	// does not keep us.
	own func() ([]net.Addr, error)
}

// NewGuard returns a Guard that lets through public addresses, and those of the
// networks allowed.
func NewGuard(allowed []netip.Prefix) *Guard {
	return &Guard{allowed: slices.Clone(allowed), own: net.InterfaceAddrs}
}

// notPublic are the special networks of IPv4 (RFC 6890 and the IANA's registry
// after it).
//
//nolint:gochecknoglobals // an immutable table
var notPublic = prefixes(
	"0.0.0.0/8",       // this host
	"10.0.0.0/8",      // private
	"100.64.0.0/10",   // shared by carriers
	"127.0.0.0/8",     // loopback
	"169.254.0.0/16",  // link-local, and clouds' metadata
	"172.16.0.0/12",   // private
	"192.0.0.0/24",    // protocols
	"192.0.2.0/24",    // documentation
	"192.88.99.0/24",  // relays of 6to4
	"192.168.0.0/16",  // private
	"198.18.0.0/15",   // benchmarks
	"198.51.100.0/24", // documentation
	"203.0.113.0/24",  // documentation
	"224.0.0.0/4",     // multicast
	"240.0.0.0/4",     // reserved, and broadcast
)

// Of IPv6 only 2000::/3 is given out at all; these parts of it are special.
//
//nolint:gochecknoglobals // immutable tables
var (
	global6    = netip.MustParsePrefix("2000::/3")
	notPublic6 = prefixes(
		"2001::/23",     // protocols, Teredo among them
		"2001:db8::/32", // documentation
		"3fff::/20",     // documentation
	)
	nat64  = netip.MustParsePrefix("64:ff9b::/96") // an IPv4 address in the last 4 bytes
	sixTo4 = netip.MustParsePrefix("2002::/16")    // one in the bytes after the first 2
)

func prefixes(texts ...string) []netip.Prefix {
	ps := make([]netip.Prefix, len(texts))
	for i, t := range texts {
		ps[i] = netip.MustParsePrefix(t)
	}
	return ps
}

// Check returns nil where a connection to a may be made, and else an error that
// wraps ErrForbidden.
func (g *Guard) Check(a netip.Addr) error {
	a = a.Unmap().WithZone("")
	if contains(g.allowed, a) {
		return nil
	}
	if !public(a) {
		return fmt.Errorf("%w: %s", ErrForbidden, a)
	}
	own, err := g.own()
	if err != nil {
		return fmt.Errorf("%w: %s: this machine's own addresses are not known: %w", ErrForbidden, a, err)
	}
	for _, o := range own {
		if p, err := netip.ParsePrefix(o.String()); err == nil && p.Addr().Unmap() == a {
			return fmt.Errorf("%w: %s is this machine", ErrForbidden, a)
		}
	}
	return nil
}

// public tells addresses on the Internet. An address within another, by which a
// gateway on the way would translate, counts as that.
func public(a netip.Addr) bool {
	if a.Is4() {
		return !contains(notPublic, a)
	}
	b := a.As16()
	switch {
	case nat64.Contains(a):
		return public(netip.AddrFrom4([4]byte(b[12:])))
	case sixTo4.Contains(a):
		return public(netip.AddrFrom4([4]byte(b[2:6])))
	}
	return a.Is6() && global6.Contains(a) && !contains(notPublic6, a)
}

func contains(ps []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Contains(a) })
}

// Control is for net.Dialer.ControlContext, which calls it with each address
// before the connection is made.
func (g *Guard) Control(_ context.Context, network, address string, _ syscall.RawConn) error {
	if network != "tcp4" && network != "tcp6" {
		return fmt.Errorf("%w: %s is no TCP", ErrForbidden, network)
	}
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrForbidden, err)
	}
	return g.Check(ap.Addr())
}
