package action_test

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
)

func newFailures(t *testing.T, o action.FailuresOptions) (*action.Failures, *mem.Store) {
	t.Helper()
	s, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	o.Entries = s
	f, err := action.NewFailures(o)
	if err != nil {
		t.Fatal(err)
	}
	return f, s
}

func failed(code int32) *repb.ExecuteResponse {
	return &repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: code}}
}

func keyOf(instance string, n int) blob.EntryKey {
	return blob.EntryKey{Instance: instance, Action: digest.Of(digest.SHA256, fmt.Append(nil, n))}
}

func TestFailures(t *testing.T) {
	f, s := newFailures(t, action.FailuresOptions{})
	k := keyOf("main", 1)
	printed := digest.Of(digest.SHA256, []byte("printed")).Proto()
	resp := &repb.ExecuteResponse{
		Result:  &repb.ActionResult{ExitCode: 2, StdoutRaw: []byte("printed"), StdoutDigest: printed, StderrRaw: []byte("only here")},
		Message: "look",
	}
	if err := f.Put(t.Context(), k, resp); err != nil {
		t.Fatal(err)
	}
	got, err := f.Get(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	want := &repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 2, StdoutDigest: printed, StderrRaw: []byte("only here")}, Message: "look"}
	if diff := cmp.Diff(want, got.Response, protocmp.Transform()); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if got.Key != k || got.ExitCode != 2 || got.Status != "" || time.Since(got.Time) > time.Minute {
		t.Errorf("%+v", got.FailureInfo)
	}
	if len(resp.Result.StdoutRaw) == 0 {
		t.Error("Put has changed the response")
	}
	// In no other instance, and of no other action.
	for _, other := range []blob.EntryKey{keyOf("", 1), keyOf("main", 2), {Instance: action.FailedInstance("main"), Action: k.Action}} {
		if _, err := f.Get(t.Context(), other); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("%v: %v, want ErrNotFound", other, err)
		}
	}
	// It is no hit, under whatever name.
	c, err := action.New(action.Options{Store: s, Entries: s})
	if err != nil {
		t.Fatal(err)
	}
	for _, instance := range []string{"main", action.FailedInstance("main")} {
		if r, err := c.Get(t.Context(), blob.EntryKey{Instance: instance, Action: k.Action}); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("the Cache has %v, %v in %q", r, err, instance)
		}
	}
	if err := c.Put(t.Context(), blob.EntryKey{Instance: action.FailedInstance("main"), Action: k.Action}, &repb.ActionResult{}); !errors.Is(err, action.ErrInvalid) {
		t.Errorf("Put among the failures: %v, want ErrInvalid", err)
	}
	if _, err := f.Get(t.Context(), k); err != nil {
		t.Errorf("after the Cache was asked for it: %v", err)
	}
}

func TestFailures_refuses(t *testing.T) {
	f, _ := newFailures(t, action.FailuresOptions{MaxResultBytes: 1000})
	for _, c := range []struct {
		name string
		resp *repb.ExecuteResponse
		want error
	}{
		{"success", failed(0), action.ErrInvalid},
		{"no_result", &repb.ExecuteResponse{Status: &spb.Status{Code: 13}}, action.ErrInvalid},
		{"absent", nil, action.ErrInvalid},
		{"not_utf8", &repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 1}, Message: "\xff"}, action.ErrInvalid},
		{"too_large", &repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 1, StdoutRaw: make([]byte, 1000)}}, blob.ErrTooLarge},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := f.Put(t.Context(), keyOf("", 1), c.resp); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
	if infos, err := f.List(t.Context()); err != nil || len(infos) != 0 {
		t.Errorf("listed: %v, %v", infos, err)
	}
}

// TestFailures_expire: and the last ones are listed first, each action once.
func TestFailures_expire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, _ := newFailures(t, action.FailuresOptions{MaxAge: time.Hour})
		put := func(k blob.EntryKey, resp *repb.ExecuteResponse) {
			t.Helper()
			if err := f.Put(t.Context(), k, resp); err != nil {
				t.Fatal(err)
			}
			time.Sleep(20 * time.Minute)
		}
		timeout := failed(137)
		timeout.Status = &spb.Status{Code: 4, Message: "too long"}
		put(keyOf("a", 1), failed(1))
		put(keyOf("a", 2), timeout)
		put(keyOf("b", 1), failed(3))
		// a's first one is an hour old, and just not too old.
		wantListed(t, f, keyOf("b", 1), keyOf("a", 2), keyOf("a", 1))
		put(keyOf("a", 2), timeout)
		wantListed(t, f, keyOf("a", 2), keyOf("b", 1))
		if _, err := f.Get(t.Context(), keyOf("a", 1)); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("the expired one: %v, want ErrNotFound", err)
		}
		if got, err := f.Get(t.Context(), keyOf("a", 2)); err != nil || got.Status != "too long" {
			t.Errorf("%+v, %v", got, err)
		}
	})
}

func wantListed(t *testing.T, f *action.Failures, want ...blob.EntryKey) {
	t.Helper()
	infos, err := f.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []blob.EntryKey
	for _, i := range infos {
		got = append(got, i.Key)
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b blob.EntryKey) bool { return a == b })); diff != "" {
		t.Errorf("listed (-want +got)\n%s", diff)
	}
}

// TestFailures_bounded: however many fail, the list has its places, and the last
// one is always in it.
func TestFailures_bounded(t *testing.T) {
	f, _ := newFailures(t, action.FailuresOptions{MaxListed: 20})
	for n := range 200 {
		if err := f.Put(t.Context(), keyOf("", n), failed(1)); err != nil {
			t.Fatal(err)
		}
		infos, err := f.List(t.Context())
		if err != nil || len(infos) == 0 || len(infos) > 20 || infos[0].Key != keyOf("", n) {
			t.Fatalf("after %d: %d listed, %v", n+1, len(infos), err)
		}
	}
}

// TestFailures_damaged: what can't be read is not there.
func TestFailures_damaged(t *testing.T) {
	f, s := newFailures(t, action.FailuresOptions{})
	k := keyOf("", 1)
	at := blob.EntryKey{Instance: action.FailedInstance(""), Action: k.Action}
	for _, value := range []string{"", "x", "\xfb\x07MF1", "\xfb\x07MF112345678\xff", "not a failure at all"} {
		if err := s.PutEntry(t.Context(), at, []byte(value)); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Get(t.Context(), k); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("%q: %v, want ErrNotFound", value, err)
		}
	}
}

func TestFailedInstance(t *testing.T) {
	for instance, want := range map[string]string{"": "actions/failed", "main": "actions/failed/main", "a/b": "actions/failed/a/b"} {
		if got := action.FailedInstance(instance); got != want {
			t.Errorf("FailedInstance(%q) = %q, want %q", instance, got, want)
		}
		if got, ok := action.CutFailedInstance(want); !ok || got != instance {
			t.Errorf("CutFailedInstance(%q) = %q, %v; want %q", want, got, ok, instance)
		}
	}
	for _, name := range []string{"", "main", "actions", "actions/failedmain", "actions/failures", "x/actions/failed"} {
		if got, ok := action.CutFailedInstance(name); ok {
			t.Errorf("CutFailedInstance(%q) = %q, true", name, got)
		}
	}
}

func TestUpdatePolicy_text(t *testing.T) {
	for _, s := range []string{"everyone", "nobody", "instances:", "instances:a", "instances:a,b/c,"} {
		var p action.UpdatePolicy
		if err := p.UnmarshalText([]byte(s)); err != nil || p.String() != s {
			t.Errorf("%q: %q, %v", s, p, err)
		}
	}
	for _, s := range []string{"", "all", "Everyone", "a,b", "instances"} {
		var p action.UpdatePolicy
		if err := p.UnmarshalText([]byte(s)); err == nil {
			t.Errorf("%q: no error", s)
		}
	}
	var p action.UpdatePolicy
	if err := p.UnmarshalText([]byte("nobody")); err != nil {
		t.Fatal(err)
	}
	if err := p.MayUpdate(t.Context(), ""); !errors.Is(err, action.ErrForbidden) {
		t.Errorf("%v, want ErrForbidden", err)
	}
}
