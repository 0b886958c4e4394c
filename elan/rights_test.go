package main

import (
	"testing"

	"github.com/mettle-build/mettle/creds/credstest"
)

// TestServe_rights: each method that is registered has a line in the table of rights,
// and says what is missing to those who lack it.
func TestServe_rights(t *testing.T) {
	addr, _ := serve(t, "127.0.0.1", t.TempDir(), func(c *serveCmd) {
		c.Policy = write(t, "policy.yaml", credstest.StrangerPolicy())
	})
	if n := credstest.Refused(t, addr, "../creds/README.md"); n < 20 {
		t.Errorf("%d methods were called", n)
	}
}
