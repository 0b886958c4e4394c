package file_test

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/file"
)

// TestStore_chaos: the lifetime contract holds under constant pressure, through
// restarts and kills, and the metric that proves it agrees.
func TestStore_chaos(t *testing.T) {
	for name, maxPacked := range map[string]int64{"files": -1, "packs": file.DefaultMaxPackedBytes} {
		t.Run(name, func(t *testing.T) { testChaos(t, maxPacked) })
	}
}

func testChaos(t *testing.T, maxPacked int64) {
	const lifetime = 600 * time.Millisecond
	dir := t.TempDir()
	var reg *prometheus.Registry
	start := func() blob.Store {
		reg = prometheus.NewRegistry()
		return open(t, file.Options{Dir: dir, MaxBytes: 8 << 20, MaxPackedBytes: maxPacked, MinLifetime: lifetime, Registerer: reg})
	}
	check := func() {
		if age := metric(t, reg, "youngest_evicted_age_seconds"); age < lifetime.Seconds() {
			t.Errorf("the youngest file evicted was %v s old, less than %v", age, lifetime)
		}
	}
	kill := false
	blobtest.Chaos(t, blobtest.ChaosOptions{
		Store:    start(),
		Lifetime: lifetime,
		Restart: func(s blob.Store) blob.Store {
			check()
			end := s.(*file.Store).Close
			if kill = !kill; kill {
				end = s.(*file.Store).Crash
			}
			if err := end(); err != nil {
				t.Error(err)
			}
			return start()
		},
	})
	check()
}
