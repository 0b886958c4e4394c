package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"flag"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	natsserver "github.com/nats-io/nats-server/v2/server"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/mettle-build/mettle/creds/credstest"
	"github.com/mettle-build/mettle/metrics"
	"github.com/mettle-build/mettle/metrics/catalog"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/runner/bare"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

var update = flag.Bool("update", false, "rewrite METRICS.md and FLAGS.md")

// TestMain is that of the program for the processes in which slots run commands.
func TestMain(m *testing.M) {
	if bare.IsHelper() {
		os.Exit(bare.HelperMain())
	}
	if sandbox.IsHelper() {
		os.Exit(sandbox.HelperMain())
	}
	os.Exit(m.Run())
}

// FLAGS.md is what the command line is.
func TestFlags(t *testing.T) {
	got, err := program(io.Discard, io.Discard).Reference(&cli{})
	if err != nil {
		t.Fatal(err)
	}
	catalog.Golden(t, "FLAGS.md", *update, got)
}

// metricsIntro begins METRICS.md.
const metricsIntro = `# The metrics of mettle

What ` + "`/metrics`" + ` of ` + "`--http_port`" + ` has, with either broker, beside what the Prometheus client library tells of every Go program
(` + "`go_*`, `process_*`" + `). Every series has the labels that Prometheus adds, such as ` + "`instance`" + `. Of metrics with labels a series is there from
its first event on. This page is made from the programs (` + "`go test ./mettle -run Metrics -update`" + `); a dashboard and alerts are in
[deploy/MONITORING.md](../deploy/MONITORING.md).

`

// METRICS.md is what the commands that serve export, and promlint finds nothing
// in it. The fleet's storage is away, and Pub/Sub, which changes no name.
func TestMetrics(t *testing.T) {
	t.Setenv("PUBSUB_EMULATOR_HOST", "127.0.0.1:1")
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(policy, []byte("anonymous: {rights: [execute]}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	a := credstest.NewAuthority(t, "ours")
	cert, key := a.Issue(t.TempDir(), "server", credstest.Server())
	trust := []string{"--policy=" + policy, "--tls_cert=" + cert, "--tls_key=" + key}
	storage := "--storage_tls_ca=" + credstest.Write(t, t.TempDir(), "ca.pem", a.PEM)
	lists := [][]catalog.Metric{dualMetrics(t, trust...)}
	for _, queue := range []string{"--queue=" + startNATS(t), "--queue=gcppubsub://project/x"} {
		lists = append(lists, apiMetrics(t, append(trust, queue, storage)...), workerMetrics(t, queue, storage))
	}
	catalog.GoldenMetrics(t, "METRICS.md", *update, metricsIntro, append(lists, metricsElsewhere(t))...)
}

// metricsElsewhere are those of METRICS.md that a machine lacks on which no action
// can run in an image.
func metricsElsewhere(t *testing.T) (list []catalog.Metric) {
	t.Helper()
	err := worker.TryImages(t.TempDir())
	if err == nil {
		return nil
	}
	t.Logf("the metrics of container images are not looked at: %v", err)
	page, err := os.ReadFile("METRICS.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range catalog.ParseMarkdown(string(page)) {
		if strings.HasPrefix(m.Name, "mettle_image_") {
			list = append(list, m)
		}
	}
	return list
}

// startNATS starts a broker and gives the URL of a queue there, set up.
func startNATS(t *testing.T) string {
	t.Helper()
	s, err := natsserver.NewServer(&natsserver.Options{Host: "127.0.0.1", Port: -1, JetStream: true, StoreDir: t.TempDir(), NoLog: true, NoSigs: true})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() {
		s.Shutdown()
		s.WaitForShutdown()
	})
	url := "nats://" + s.Addr().String() + "/x"
	var stderr bytes.Buffer
	if status := run([]string{"setup", "--queue=" + url}, io.Discard, &stderr); status != 0 {
		t.Fatalf("setup: exit status %d\n%s", status, &stderr)
	}
	return url
}

// awaitNATS waits for a broker that is there: its metrics come with the connection.
func awaitNATS(t *testing.T, url string, jobs queue.Broker) {
	t.Helper()
	if !strings.HasPrefix(url, "nats:") {
		return
	}
	for jobs.Ready(t.Context()) != nil {
		time.Sleep(5 * time.Millisecond) // nothing tells
		if t.Context().Err() != nil {
			t.Fatal(t.Context().Err())
		}
	}
}

// parsed is a command line.
func parsed(t *testing.T, args ...string) *cli {
	t.Helper()
	c := &cli{}
	parser, err := program(io.Discard, io.Discard).Parser(c, func(int) {})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parser.Parse(args); err != nil {
		t.Fatal(err)
	}
	return c
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func dualMetrics(t *testing.T, args ...string) []catalog.Metric {
	t.Helper()
	c := parsed(t, append([]string{"dual", "--http_port=-1", "--slots=1"}, args...)...)
	log := slog.New(slog.DiscardHandler)
	d := &dual{cmd: &c.Dual, dir: t.TempDir(), listener: listen(t), log: log, registry: metrics.NewRegistry()}
	d.admin = adminPage{name: "mettle dual", registry: d.registry, log: log}
	if err := d.wire(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer closed(t, d.close)
	return during(t, "mettle dual", d.registry, d.listener, d.serve)
}

func apiMetrics(t *testing.T, args ...string) []catalog.Metric {
	t.Helper()
	c := parsed(t, append([]string{"api", "--http_port=-1", "--storage=127.0.0.1:1", "--pools=default/1"}, args...)...)
	log := slog.New(slog.DiscardHandler)
	s := &apiServer{cmd: &c.API, listener: listen(t), log: log, registry: metrics.NewRegistry()}
	s.admin = adminPage{name: "mettle api", storesOnly: true, registry: s.registry, log: log}
	if err := s.wire(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer closed(t, s.closers.close)
	awaitNATS(t, s.cmd.Queue, s.jobs)
	return during(t, "mettle api", s.registry, s.listener, s.serve)
}

func workerMetrics(t *testing.T, args ...string) []catalog.Metric {
	t.Helper()
	c := parsed(t, append([]string{"worker", "--http_port=-1", "--slots=1", "--storage=127.0.0.1:1", "--dir=" + t.TempDir()}, args...)...)
	log := slog.New(slog.DiscardHandler)
	w := &fleetWorker{cmd: &c.Worker, log: log, registry: metrics.NewRegistry()}
	w.admin = adminPage{name: "mettle worker", storesOnly: true, registry: w.registry, log: log}
	if err := w.wire(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer closed(t, w.closers.close)
	awaitNATS(t, w.cmd.Queue, w.jobs)
	return metricsOf(t, "mettle worker", w.registry)
}

func closed(t *testing.T, end func() error) {
	t.Helper()
	if err := end(); err != nil {
		t.Error(err)
	}
}

// during lists the metrics of a server that answers.
func during(t *testing.T, program string, r *prometheus.Registry, l net.Listener, serve func(context.Context) error) []catalog.Metric {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1) // one value, so that the goroutine never waits for its reader
	go func() { served <- serve(ctx) }()
	defer func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	conn, err := grpc.NewClient("passthrough:///"+l.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}))) //nolint:gosec // it is only to answer
	if err != nil {
		t.Error(err)
		return nil
	}
	defer conn.Close()
	// The last parts are made on the way to the first answer.
	if _, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Error(err)
	}
	return metricsOf(t, program, r)
}

func metricsOf(t *testing.T, program string, r *prometheus.Registry) []catalog.Metric {
	t.Helper()
	all, err := catalog.Of(program, r)
	if err != nil {
		t.Error(err)
	}
	return all
}
