package metrics

import (
	"net"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"strings"
)

// guarded keeps pages of a server on loopback from web sites that a browser of this
// machine shows: one whose name its owner has resolve to loopback would be of the same
// origin as they, and could read them. Such a name has a dot. No page is shown in the
// frame of another.
func guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if at, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok && loopback(at.String()) && !ours(r.Host) {
			plain(w, http.StatusForbidden, "these pages are called by localhost or by an address")
			return
		}
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Content-Security-Policy", "frame-ancestors 'none'")
		next.ServeHTTP(w, r)
	})
}

func loopback(addr string) bool {
	a, err := netip.ParseAddrPort(addr)
	return err == nil && a.Addr().Unmap().IsLoopback()
}

// ours reports whether a Host header is a name that nobody on the Internet can have.
func ours(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.TrimSuffix(host, ".")
	if _, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return true
	}
	return !strings.Contains(host, ".") || strings.HasSuffix(strings.ToLower(host), ".localhost")
}

// userinfo is what may be a password in a URL.
var userinfo = regexp.MustCompile(`://[^/?#\s]*@`)

// serveCommandLine is pprof's cmdline without the passwords of URLs.
func serveCommandLine(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = w.Write([]byte(withoutPasswords(os.Args))) // the client may have gone
}

func withoutPasswords(args []string) string {
	return userinfo.ReplaceAllString(strings.Join(args, "\x00"), "://xxxxx@")
}
