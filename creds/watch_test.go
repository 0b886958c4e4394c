package creds_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/creds/credstest"
)

// gauges are the values by name and use.
func gauges(t *testing.T, r prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if problems, err := promlint.NewWithMetricFamilies(families).Lint(); err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v %v", problems, err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			got[f.GetName()+" "+m.GetLabel()[0].GetValue()] = m.GetGauge().GetValue()
		}
	}
	return got
}

func TestWatch(t *testing.T) {
	dir := t.TempDir()
	now := time.Now().Truncate(time.Second)
	old := credstest.NewAuthorityUntil(t, "old", now.Add(time.Hour))
	next := credstest.NewAuthorityUntil(t, "next", now.Add(2*time.Hour))
	server := credstest.Server()
	server.NotAfter = now.Add(30 * time.Minute)
	cert, key := next.Issue(dir, "server", server)
	ca := credstest.Write(t, dir, "ca.pem", old.PEM+next.PEM)
	token := credstest.Write(t, dir, "token", "secret")
	written := now.Add(-time.Minute)
	for _, f := range []string{cert, ca, token} {
		if err := os.Chtimes(f, written, written); err != nil {
			t.Fatal(err)
		}
	}
	r := prometheus.NewPedanticRegistry()
	if err := creds.Watch(r,
		creds.File{Use: "server", Path: cert, Key: key}, creds.File{Use: "client_ca", Path: ca}, creds.File{Use: "storage_token", Path: token, Opaque: true},
		creds.File{Use: "storage"},
	); err != nil {
		t.Fatal(err)
	}
	const end, usable, modified = "creds_certificate_not_after_timestamp_seconds ", "creds_file_usable ", "creds_file_modified_timestamp_seconds "
	want := map[string]float64{
		end + "server": float64(now.Unix() + 1800), usable + "server": 1, modified + "server": float64(written.Unix()),
		end + "client_ca": float64(now.Unix() + 7200), usable + "client_ca": 1, modified + "client_ca": float64(written.Unix()),
		usable + "storage_token": 1, modified + "storage_token": float64(written.Unix()),
	}
	if d := cmp.Diff(want, gauges(t, r)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}

	// A certificate that does not go with its key is not used, and the last one that
	// did still counts. A token that has gone is told of.
	other, _ := old.Issue(t.TempDir(), "server", credstest.Server())
	if err := os.Rename(other, cert); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(token); err != nil {
		t.Fatal(err)
	}
	credstest.Write(t, dir, "ca.pem", "nothing")
	got := gauges(t, r)
	for name, want := range map[string]float64{
		usable + "server": 0, end + "server": float64(now.Unix() + 1800), usable + "client_ca": 0, end + "client_ca": float64(now.Unix() + 7200), usable + "storage_token": 0,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %v, %v, want %v", name, v, ok, want)
		}
	}
	if _, ok := got[modified+"storage_token"]; ok {
		t.Error("a file that has gone has an age")
	}
	if err := creds.Watch(r, creds.File{Use: "server", Path: filepath.Join(dir, "x")}); err == nil {
		t.Error("two files have the same use")
	}
	if err := creds.Watch(nil, creds.File{Use: "server", Path: cert}); err != nil {
		t.Error(err)
	}
}

// TestWatch_content: a file that is there, and with which a restart would fail, can't be
// used.
func TestWatch_content(t *testing.T) {
	dir := t.TempDir()
	token, policy := credstest.Write(t, dir, "token", ""), credstest.Write(t, dir, "policy.yaml", "")
	r := prometheus.NewPedanticRegistry()
	if err := creds.Watch(r, creds.TokenFile("storage_token", token), creds.PolicyFile(policy), creds.PolicyFile("")); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		token, policy         string
		wantToken, wantPolicy float64
	}{
		"good":          {"a-token\n", usual(), 1, 1},
		"empty":         {" \n", "", 0, 0},
		"of two":        {"one two", usual() + "---\n" + usual(), 0, 0},
		"mistaken":      {"to\x01ken", "identities: [{name: a}]", 0, 0},
		"being written": {"", usual()[:20], 0, 0},
	} {
		credstest.Write(t, dir, "token", tc.token)
		credstest.Write(t, dir, "policy.yaml", tc.policy)
		got := gauges(t, r)
		if tok, pol := got["creds_file_usable storage_token"], got["creds_file_usable policy"]; tok != tc.wantToken || pol != tc.wantPolicy {
			t.Errorf("%s: token %v, policy %v, want %v and %v", name, tok, pol, tc.wantToken, tc.wantPolicy)
		}
	}
}
