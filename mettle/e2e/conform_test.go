package e2e_test

import (
	"os/exec"
	"strings"
	"testing"
)

// TestConform holds the three ways of serving to the specification: dual, Elan
// alone, and a fleet by its API server.
func TestConform(t *testing.T) {
	for name, serve := range map[string]func(t *testing.T) *server{
		"dual": func(t *testing.T) *server { return startDual(t, storeDir(t), "--slots=8") },
		"elan": func(t *testing.T) *server { return startElan(t, "file://"+t.TempDir()) },
		"fleet": func(t *testing.T) *server {
			f := newFleet(t)
			for _, s := range []*server{f.broker, f.elan, f.api} {
				s.Start()
			}
			w := f.worker(0)
			w.args = append(w.args, "--slots=8")
			w.Start()
			awaitReady(t, w)
			awaitReady(t, f.api)
			return f.api
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t)
			out, err := exec.CommandContext(t.Context(), binary(t, "mettle"), "conform", "--remote="+s.Addr(), "--timeout=5m").CombinedOutput()
			if err != nil || !strings.Contains(string(out), " 0 failed") {
				t.Errorf("mettle conform: %v\n%s", err, out)
			}
			out, err = exec.CommandContext(t.Context(), binary(t, "mettle"), "doctor", "--remote="+s.Addr()).CombinedOutput()
			if err != nil || (name != "elan") != strings.Contains(string(out), "from the cache") {
				t.Errorf("mettle doctor: %v\n%s", err, out)
			}
		})
	}
}
