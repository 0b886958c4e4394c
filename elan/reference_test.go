package main

import (
	"flag"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/mettle-build/mettle/creds/credstest"
	"github.com/mettle-build/mettle/elan/blob/open"
	"github.com/mettle-build/mettle/metrics"
	"github.com/mettle-build/mettle/metrics/catalog"
)

var update = flag.Bool("update", false, "rewrite METRICS.md and FLAGS.md")

// FLAGS.md is what the command line is.
func TestFlags(t *testing.T) {
	got, err := program(nil, io.Discard, io.Discard).Reference(&cli{})
	if err != nil {
		t.Fatal(err)
	}
	catalog.Golden(t, "FLAGS.md", *update, got)
}

// metricsIntro begins METRICS.md.
const metricsIntro = `# The metrics of elan

What ` + "`/metrics`" + ` of ` + "`--http_port`" + ` has, over all kinds of storage, beside what the Prometheus client library tells of every Go program
(` + "`go_*`, `process_*`" + `). Every series has the labels that Prometheus adds, such as ` + "`instance`" + `; the label ` + "`tier`" + ` is
there where the storage has several. Of metrics with labels a series is there from
its first event on. This page is made from the programs (` + "`go test ./elan -run Metrics -update`" + `); a dashboard and alerts are in
[deploy/MONITORING.md](../deploy/MONITORING.md).

`

// METRICS.md is what elan exports, over every kind of storage, and promlint finds
// nothing in it.
func TestMetrics(t *testing.T) {
	bucket := httptest.NewServer(http.HandlerFunc(emptyBucket))
	defer bucket.Close()
	t.Setenv("AWS_ENDPOINT_URL", bucket.URL)
	t.Setenv("AWS_ACCESS_KEY_ID", "id")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	t.Setenv("STORAGE_EMULATOR_HOST", bucket.URL)
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(policy, []byte("anonymous: {rights: [cas:read]}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cert, key := credstest.NewAuthority(t, "ours").Issue(t.TempDir(), "server", credstest.Server())
	trust := []string{"--policy=" + policy, "--tls_cert=" + cert, "--tls_key=" + key}
	var lists [][]catalog.Metric
	for _, urls := range [][]string{
		{"file://" + t.TempDir()},
		{"mem://", "file://" + t.TempDir()},
		{"s3://bucket/x?compress=zstd"},
		{"gs://bucket/x"},
	} {
		lists = append(lists, metricsOver(t, trust, urls))
	}
	catalog.GoldenMetrics(t, "METRICS.md", *update, metricsIntro, lists...)
}

// emptyBucket answers as a bucket that is there, and has nothing.
func emptyBucket(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/bucket", "/bucket/": // S3
	case "/storage/v1/b/bucket/o": // Google's
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"items": []}`)) // the client may have gone
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

// metricsOver are those of a server over stores.
func metricsOver(t *testing.T, trust, urls []string) []catalog.Metric {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	c := &cli{}
	parser, err := program(nil, io.Discard, io.Discard).Parser(c, func(int) {})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parser.Parse(append([]string{"serve"}, trust...)); err != nil {
		t.Fatal(err)
	}
	s := &server{cmd: &c.Serve, log: log, registry: metrics.NewRegistry()}
	if s.storage, err = open.Open(t.Context(), open.Options{Logger: log, Registerer: s.registry}, urls...); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.storage.Close(); err != nil {
			t.Error(err)
		}
	}()
	if err := s.wire(t.Context(), &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
		t.Fatal(err)
	}
	all, err := catalog.Of("elan", s.registry)
	if err != nil {
		t.Error(err)
	}
	s.grpc.Stop()
	if err := s.close(); err != nil {
		t.Error(err)
	}
	return all
}
