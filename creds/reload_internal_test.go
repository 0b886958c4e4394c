package creds

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestGuard_change has files change between the readings of them, and a policy while
// a token is looked at.
func TestGuard_change(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.yaml")
	write := func(rights string) {
		t.Helper()
		if err := os.WriteFile(path, []byte("anonymous: {rights: ["+rights+"]}"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("cas:read")
	g, err := New(Options{Policy: path})
	if err != nil {
		t.Fatal(err)
	}
	old := g.policy.Load()
	write("cas:write")
	p, err := g.read()
	if err != nil {
		t.Fatal(err)
	}
	write("execute") // after the policy was read, and before it is taken
	g.adopt(p)
	g.reload()
	if !g.policy.Load().anonymous.mayAnywhere([]Right{Execute}) {
		t.Error("what was written while the policy was read is never found")
	}
	hash, now := [32]byte{1}, time.Now()
	old.remembered.put(hash, old.anonymous, now, now.Add(time.Hour))
	if id := g.policy.Load().remembered.get(hash, now); id != nil {
		t.Errorf("a token has by the new policy what the old one gave it: %v", id)
	}
}
