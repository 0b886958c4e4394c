package nats

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDecide(t *testing.T) {
	leased := record{Operation: "a", Job: 5, State: stateLeased, Attempt: 2, Fence: 1, Lease: "old", Worker: "w", Replies: []string{"api"}}
	with := func(r record, f func(*record)) record {
		r = r.clone()
		f(&r)
		return r
	}
	withdrawn := with(leased, func(r *record) { r.Cancelled = 5 })
	ended := with(leased, func(r *record) { r.State = stateEnded })
	waiting := with(leased, func(r *record) { r.State, r.History = stateWaiting, []string{"attempt 1: w fell silent"} })
	for name, tc := range map[string]struct {
		record   record
		sequence uint64
		lapsed   bool
		want     verdict
		attempt  uint32 // of the record that comes of it
		fence    uint32
		history  int
	}{
		"no record":                            {record{State: stateWaiting}, 5, true, verdictTake, 0, 0, 0},
		"handed back":                          {waiting, 5, true, verdictTake, 2, 1, 1},
		"lapsed":                               {leased, 5, true, verdictTake, 2, 1, 1},
		"delivered again while leased":         {leased, 5, false, verdictLater, 2, 1, 0},
		"the same in another pool":             {leased, 9, false, verdictDrop, 2, 1, 0},
		"an older one than the record's":       {leased, 4, true, verdictDrop, 2, 1, 0},
		"withdrawn":                            {withdrawn, 5, false, verdictDrop, 2, 1, 0},
		"published again after a withdrawal":   {withdrawn, 9, false, verdictTake, 2, 2, 0},
		"that had waited when it was":          {with(waiting, func(r *record) { r.Cancelled = 5 }), 9, true, verdictTake, 2, 2, 0},
		"ended, and its message is still here": {ended, 5, true, verdictDrop, 2, 1, 0},
		"published again after its end":        {ended, 9, true, verdictTake, 0, 0, 0},
		"published by two before the first":    {record{State: stateWaiting, Replies: []string{"b"}}, 9, true, verdictTake, 0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			before := tc.record.clone()
			next, v, lapsed := decide(tc.record, tc.sequence, "new", tc.lapsed)
			if v != tc.want || next.Attempt != tc.attempt || next.Fence != tc.fence || len(next.History) != tc.history {
				t.Errorf("verdict %d, attempt %d, fence %d, history %q, want %d, %d, %d and %d entries",
					v, next.Attempt, next.Fence, next.History, tc.want, tc.attempt, tc.fence, tc.history)
			}
			if v == verdictTake && next.Job != tc.sequence {
				t.Errorf("the record is about job %d, want %d", next.Job, tc.sequence)
			}
			if got := lapsed != nil; got != (name == "lapsed") {
				t.Errorf("lapsed is %v", lapsed)
			}
			if d := cmp.Diff(before, tc.record); d != "" {
				t.Errorf("the record given was changed:\n%s", d)
			}
		})
	}
	if _, v, _ := decide(leased, 5, "old", false); v != verdictOurs {
		t.Errorf("the verdict on our own lease is %d", v)
	}
}

func TestRecord_addReply(t *testing.T) {
	var r record
	for _, api := range []string{"", "a", "b", "a", "c", "d", "e"} {
		r.addReply(api)
	}
	if d := cmp.Diff([]string{"b", "c", "d", "e"}, r.Replies); d != "" {
		t.Errorf("replies (-want +got):\n%s", d)
	}
}

// What was handed back through no fault of the job's does not count, and one who
// fails at it time and again is told of so long as there is room.
func TestRecord_usedUp(t *testing.T) {
	r := record{Attempt: 7, Fence: 2, Released: 3}
	if r.usedUp(3) || !r.usedUp(2) {
		t.Errorf("of 5 attempts 3 were released: used up are 3 is %v, 2 is %v", r.usedUp(3), r.usedUp(2))
	}
	for i := range 3 * maxHistory {
		r.Attempt++
		r.Worker = strings.Repeat("w", maxWorkerName)
		r.endAttempt(strings.Repeat("x", maxReason))
		if data, err := json.Marshal(r); err != nil || len(data) > maxRecord {
			t.Fatalf("a record with the history of %d attempts takes %d bytes: %v", i+1, len(data), err)
		}
	}
	if last := r.History[len(r.History)-1]; len(r.History) != maxHistory || !strings.HasPrefix(last, "attempt 53:") {
		t.Errorf("%d of them are told of, the last as %.20s", len(r.History), last)
	}
}

func FuzzParseRecord(f *testing.F) {
	f.Add([]byte(`{"operation":"a","job":5,"state":"leased","attempt":2,"lease":"x","replies":["api"]}`))
	f.Add([]byte(`{"state":"ended","attempt":1,"fence":2}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := parseRecord(data)
		if err != nil {
			return
		}
		again, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseRecord(again); err != nil && len(again) <= maxRecord {
			t.Errorf("%s is written as %s: %v", data, again, err)
		}
		decide(r, 7, "new", true)
	})
}

func TestToken(t *testing.T) {
	seen := map[string]string{}
	for _, s := range []string{"", "p", "P", "a.b", "a=2eb", "a*", "a>", "a b", "ü", strings.Repeat("x", 65), strings.Repeat("x", 66), "="} {
		got := token(s)
		if other, ok := seen[got]; ok {
			t.Errorf("%q and %q are both %s", s, other, got)
		}
		seen[got] = s
		if strings.ContainsAny(got, ".*> /\\\t\n") || got == "" || len(got) > maxToken {
			t.Errorf("%q becomes %q", s, got)
		}
	}
}
