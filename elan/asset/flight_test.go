package asset_test

import (
	"context"
	"errors"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/mettle-build/mettle/elan/asset"
	"github.com/mettle-build/mettle/elan/blob"
)

// gate is an origin that answers when it is let.
type gate struct {
	*site
	began chan struct{} // gets a value for each request
	open  chan struct{} // closed to answer
	ended chan struct{} // gets a value for each request that was given up
}

func newGate(t *testing.T) *gate {
	g := &gate{began: make(chan struct{}, 100), open: make(chan struct{}), ended: make(chan struct{}, 100)}
	g.site = newSite(t, func(w http.ResponseWriter, r *http.Request) {
		g.began <- struct{}{}
		select {
		case <-g.open:
			_, _ = w.Write([]byte("hello"))
		case <-r.Context().Done():
			g.ended <- struct{}{}
		}
	})
	return g
}

// fetching fetches in the background.
func fetching(ctx context.Context, a *asset.Service, r asset.Request) <-chan error {
	done := make(chan error, 1)
	go func() {
		_, err := a.FetchBlob(ctx, r)
		done <- err
	}()
	return done
}

// waitFor waits until n callers wait for flights.
func waitFor(t *testing.T, a *asset.Service, n int) {
	t.Helper()
	for a.Waiting() != n {
		select {
		case <-t.Context().Done():
			t.Fatalf("%d callers wait, want %d", a.Waiting(), n)
		case <-time.After(time.Millisecond):
		}
	}
}

// TestFlight_shared: however many ask, one fetch is made, and no caller that gives
// up takes it from the others.
func TestFlight_shared(t *testing.T) {
	g := newGate(t)
	a := newService(t, nil, asset.Options{})
	first, giveUp := context.WithCancel(t.Context())
	left := fetching(first, a, request(g.URL))
	<-g.began
	var others []<-chan error
	for range 20 {
		others = append(others, fetching(t.Context(), a, request(g.URL)))
	}
	waitFor(t, a, 21)
	giveUp()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("the one that gave up: %v", err)
	}
	close(g.open)
	for _, o := range others {
		if err := <-o; err != nil {
			t.Error(err)
		}
	}
	if n := len(g.requests()); n != 1 {
		t.Errorf("%d requests, want one", n)
	}
}

// TestFlight_apart: who may get something else has a fetch of his own.
func TestFlight_apart(t *testing.T) {
	g := newGate(t)
	a := newService(t, nil, asset.Options{})
	fresh := request(g.URL)
	fresh.Oldest = time.Now().Add(time.Hour)
	same := fresh // a client that tries again
	later := request(g.URL)
	later.Oldest = time.Now().Add(2 * time.Hour)
	var all []<-chan error
	for i, r := range []asset.Request{
		request(g.URL), fresh, later,
		request(g.URL, "http_header:Authorization", "a"), request(g.URL, "http_header:Authorization", "b"),
		request(g.URL, "checksum.sri", sri("hello")),
		{URIs: []string{g.URL, g.URL + "/mirror"}},
		{URIs: []string{g.URL}, Instance: "x"},
	} {
		all = append(all, fetching(t.Context(), a, r))
		<-g.began
		waitFor(t, a, i+1)
	}
	// These wait for one of those above.
	all = append(all, fetching(t.Context(), a, later), fetching(t.Context(), a, request(g.URL)), fetching(t.Context(), a, same))
	waitFor(t, a, 11)
	close(g.open)
	for _, done := range all {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if n := len(g.requests()); n != 8 {
		t.Errorf("%d requests, want 8", n)
	}
}

// TestFlight_goesOn when the deadline of the call passes, for the next call.
func TestFlight_goesOn(t *testing.T) {
	g := newGate(t)
	s := newStore(t)
	a := newService(t, s, asset.Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	r := request(g.URL)
	r.Timeout = time.Hour
	if _, err := a.FetchBlob(ctx, r); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("%v, want DeadlineExceeded", err)
	}
	<-g.began
	again := fetching(t.Context(), a, r)
	waitFor(t, a, 1)
	close(g.open)
	if err := <-again; err != nil {
		t.Fatal(err)
	}
	if n := len(g.requests()); n != 1 {
		t.Errorf("%d requests, want one", n)
	}
}

// TestFlight_longerTimeout: who has more time gets it, without a fetch of his own.
func TestFlight_longerTimeout(t *testing.T) {
	g := newGate(t)
	a := newService(t, nil, asset.Options{})
	short, long := request(g.URL), request(g.URL)
	short.Timeout = 50 * time.Millisecond
	first := fetching(t.Context(), a, short)
	<-g.began
	second := fetching(t.Context(), a, long)
	waitFor(t, a, 2)
	wantReason(t, <-first, asset.TimedOut)
	close(g.open)
	if err := <-second; err != nil {
		t.Error(err)
	}
	if n := len(g.requests()); n != 1 {
		t.Errorf("%d requests, want one", n)
	}
}

// TestFlight_bounded: no more fetches run at once than are allowed.
func TestFlight_bounded(t *testing.T) {
	g := newGate(t)
	a := newService(t, nil, asset.Options{MaxFetches: 2})
	var all []<-chan error
	for _, path := range []string{"/1", "/2", "/3", "/4"} {
		all = append(all, fetching(t.Context(), a, request(g.URL+path)))
	}
	<-g.began
	<-g.began
	waitFor(t, a, 4)
	select {
	case <-g.began:
		t.Error("a third began")
	case <-time.After(20 * time.Millisecond):
	}
	// One that waits for its turn has no more time than others.
	r := request(g.URL + "/5")
	r.Timeout = time.Millisecond
	_, err := a.FetchBlob(t.Context(), r)
	wantReason(t, err, asset.TimedOut)
	close(g.open)
	for _, done := range all {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestClose(t *testing.T) {
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	g := newGate(t)
	s := newStore(t)
	a, err := asset.New(asset.Options{Store: s, Entries: s, AllowPrivate: loopback()})
	if err != nil {
		t.Fatal(err)
	}
	large := strings.Repeat("x", 3<<20)
	wantBlob(t, a, s, request(newSite(t, serving(large)).URL), large)
	if made, err := filepath.Glob(filepath.Join(temp, "*")); err != nil || len(made) != 1 {
		t.Errorf("directories %v, %v; want one", made, err)
	}
	done := fetching(t.Context(), a, request(g.URL))
	<-g.began
	var closers sync.WaitGroup
	for range 2 { // it may be closed twice
		closers.Go(func() {
			if err := a.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	closers.Wait()
	if err := <-done; !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("a fetch that was under way: %v, want ErrUnavailable", err)
	}
	<-g.ended
	if left, err := filepath.Glob(filepath.Join(temp, "*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if _, err := a.FetchBlob(t.Context(), request(g.URL)); !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("after Close: %v, want ErrUnavailable", err)
	}
}

func TestMetrics(t *testing.T) {
	o := newSite(t, serving("hello"))
	reg := prometheus.NewPedanticRegistry()
	s := newStore(t)
	a := newService(t, s, asset.Options{Registerer: reg})
	wantBlob(t, a, s, request(o.URL), "hello")
	wantBlob(t, a, s, request(o.URL), "hello")
	if _, err := a.FetchBlob(t.Context(), request("urn:x")); err == nil {
		t.Error("no error")
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if problems, err := promlint.NewWithMetricFamilies(families).Lint(); err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
	for outcome, want := range map[string]float64{"fetched": 1, "known": 1, "not_found": 1} {
		got := 0.0
		for _, f := range families {
			for _, m := range f.Metric {
				for _, l := range m.Label {
					if f.GetName() == "elan_asset_requests_total" && l.GetValue() == outcome {
						got = m.GetCounter().GetValue()
					}
				}
			}
		}
		if got != want {
			t.Errorf("outcome %s: %v, want %v", outcome, got, want)
		}
	}
}

func TestNew_refuses(t *testing.T) {
	s := newStore(t)
	for name, o := range map[string]asset.Options{
		"no store":           {Entries: s},
		"no entries":         {Store: s},
		"negative bytes":     {Store: s, Entries: s, MaxBytes: -1},
		"a negative timeout": {Store: s, Entries: s, Timeout: -1},
	} {
		if a, err := asset.New(o); err == nil {
			t.Errorf("%s: no error", name)
			_ = a.Close()
		}
	}
}
