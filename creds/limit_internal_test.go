package creds

import "testing"

// TestLimiters_byTurns: a caller who has tokens with different limits has no more calls
// by taking them in turn than by the best of them.
func TestLimiters_byTurns(t *testing.T) {
	var ls limiters
	passed := 0
	for i := range 20 {
		id := &Identity{Name: "developers:alice", limits: limits{perSecond: []float64{0.001, 0.002}[i%2], concurrent: i % 3}}
		if leave, over := ls.enter(id); over == nil {
			passed++
			leave()
		}
	}
	if passed != 1 {
		t.Errorf("%d of 20 calls passed, want 1, since the limits let one pass in minutes", passed)
	}
}
