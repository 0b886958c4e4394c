package flags

import (
	"net"
	"net/netip"
	"time"
)

// Assets are the flags of the Remote Asset API, for a command that serves it to
// embed.
type Assets struct {
	Assets            string         `help:"Whether clients may have this server fetch URLs (the Remote Asset API): on, off, or auto, which is on where only this machine can connect." enum:"auto,on,off" default:"auto"`
	AssetAllowPrivate []netip.Prefix `help:"Networks that are not public and that assets may be fetched from, as 10.1.0.0/16; repeated, or separated by commas." placeholder:"CIDR"`
	AssetMaxSize      Size           `help:"How large an asset may be." default:"16GiB"`
	AssetTimeout      time.Duration  `help:"How long fetching an asset may take at most." default:"30m"`
}

// Served tells whether to serve assets on the listener of that address. Fetching
// what strangers name is a risk, even where private networks are out of reach: they
// use this machine's line and address for it. Those who can run programs on this
// machine can do so anyway.
func (a Assets) Served(listener net.Addr) bool {
	if a.Assets != "auto" {
		return a.Assets == "on"
	}
	tcp, ok := listener.(*net.TCPAddr)
	return ok && tcp.IP.IsLoopback()
}
