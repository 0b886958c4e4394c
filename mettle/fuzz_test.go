package main

import (
	"path/filepath"
	"strings"
	"testing"
)

// FuzzAddresses: what flags name is looked at without harm, and only whole paths are
// hidden from actions.
func FuzzAddresses(f *testing.F) {
	f.Add("nats://h/x?credentials=/etc/c&key=k", "localhost:7777")
	f.Add("nats://h?credentials=%zz", "dns:///[::1]:1")
	f.Add("?key=/", "")
	f.Add("gcppubsub://p/x?key=..", "10.0.0.1")
	f.Fuzz(func(t *testing.T, queue, target string) {
		for _, path := range (&queueFlags{Queue: queue}).secrets() {
			if !filepath.IsAbs(path) || path == "/" {
				t.Errorf("%q hides %q", queue, path)
			}
		}
		if isHere(target) && !strings.Contains(target, "localhost") && !strings.ContainsAny(target, ":.") {
			t.Errorf("%q is taken for this machine", target)
		}
	})
}
