package open_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/metrics/logtest"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/open"
	"github.com/mettle-build/mettle/mettle/queue/pubsub/pubsubtest"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds each wait for something that must come.
const patience = 30 * time.Second

// startNATS starts a broker on a port; 0 is any free one.
func startNATS(t *testing.T, port int, users ...*server.User) (url string) {
	t.Helper()
	if port == 0 {
		port = server.RANDOM_PORT
	}
	s, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: port, JetStream: true, StoreDir: t.TempDir(), NoSigs: true, NoLog: true, Users: users,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() {
		s.Shutdown()
		s.WaitForShutdown()
	})
	if !s.ReadyForConnections(patience) {
		t.Fatal("the broker does not start")
	}
	return "nats://" + s.Addr().String()
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func parse(t *testing.T, url string) *open.URL {
	t.Helper()
	u, err := open.ParseURL(url)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// passJob has a job go from one side to the other.
func passJob(t *testing.T, q queue.Broker) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for { // the broker may not be there yet
		err := q.Publish(ctx, &queuepb.Job{Operation: "a", ReplyTo: "api", Pool: "p"})
		if err == nil {
			break
		}
		if ctx.Err() != nil || !errors.Is(err, queue.ErrUnavailable) {
			t.Fatal(err)
		}
	}
	l, err := q.Lease(ctx, []string{"p"})
	if err != nil {
		t.Fatal(err)
	}
	if l.Job().GetOperation() != "a" {
		t.Errorf("leased %v", l.Job())
	}
	if err := l.Ack(ctx); err != nil {
		t.Error(err)
	}
}

// A broker that is away when it is opened is there when it comes, to those who
// wait in a call as well.
func TestURL_Open_brokerComesLater(t *testing.T) {
	port := freePort(t)
	log := &logtest.Buffer{}
	u := parse(t, fmt.Sprintf("nats://127.0.0.1:%d/p", port))
	q, err := u.Open(t.Context(), open.Options{Logger: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "waiting for the broker") {
		t.Errorf("the log does not say that the broker is away: %s", log)
	}
	if err := q.Ready(t.Context()); !errors.Is(err, queue.ErrUnavailable) {
		t.Errorf("ready: %v, want %v", err, queue.ErrUnavailable)
	}
	updates := make(chan *queuepb.Update, 1)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- q.ReceiveUpdates(ctx, "api", func(u *queuepb.Update) { updates <- u }) }()
	startNATS(t, port)
	passJob(t, q)
	if err := q.Ready(t.Context()); err != nil {
		t.Errorf("ready: %v", err)
	}
	if err := q.SendUpdate(t.Context(), "api", &queuepb.Update{Operation: "a", Attempt: 1, Stage: queuepb.Update_COMPLETED}); err != nil {
		t.Error(err)
	}
	select {
	case <-updates:
	case <-time.After(patience):
		t.Error("no update came")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("receive: %v", err)
	}
	if err := q.Close(); err != nil {
		t.Error(err)
	}
}

// A broker that never comes stops nobody from ending.
func TestURL_Open_brokerNeverComes(t *testing.T) {
	q, err := parse(t, fmt.Sprintf("nats://127.0.0.1:%d/p", freePort(t))).Open(t.Context(), open.Options{})
	if err != nil {
		t.Fatal(err)
	}
	done, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := q.Lease(done, []string{"p"}); !errors.Is(err, context.Canceled) {
		t.Errorf("lease: %v", err)
	}
	if err := q.ReceiveUpdates(done, "api", func(*queuepb.Update) {}); err != nil {
		t.Errorf("receive: %v", err)
	}
	if err := q.Publish(done, &queuepb.Job{}); !errors.Is(err, context.Canceled) {
		t.Errorf("publish: %v", err)
	}
	waits := make(chan error)
	go func() {
		_, err := q.Lease(t.Context(), []string{"p"})
		waits <- err
	}()
	for range 2 {
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	}
	for what, err := range map[string]error{
		"a lease that waited": <-waits, "ready": q.Ready(t.Context()), "notify": q.Notify(t.Context(), &queuepb.Notice{}),
		"listen": q.ListenNotices(t.Context(), "api", func(*queuepb.Notice) {}),
	} {
		if !errors.Is(err, queue.ErrClosed) {
			t.Errorf("%s: %v, want %v", what, err, queue.ErrClosed)
		}
	}
}

// A broker that refuses is no broker to wait for.
func TestURL_Open_refused(t *testing.T) {
	url := startNATS(t, 0, &server.User{Username: "u", Password: "right"})
	_, err := parse(t, strings.Replace(url, "://", "://u:wrong@", 1)).Open(t.Context(), open.Options{})
	if !errors.Is(err, queue.ErrRefused) {
		t.Errorf("open: %v, want %v", err, queue.ErrRefused)
	}
}

func TestURL_Setup(t *testing.T) {
	fake, err := pubsubtest.New("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = fake.Close() })
	for _, tc := range []struct {
		name, url string
		refused   bool // before Setup
	}{
		{"nats", startNATS(t, 0) + "/p?must_exist=true", true},
		{"pub/sub", "gcppubsub://project/prefix", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Setenv("PUBSUB_EMULATOR_HOST", fake.Addr)
			u := parse(t, tc.url)
			if _, err := u.Open(t.Context(), open.Options{}); !errors.Is(err, queue.ErrRefused) || !strings.Contains(err.Error(), "mettle setup") {
				t.Errorf("before Setup: %v, want what to do", err)
			}
			for range 2 {
				if err := u.Setup(t.Context(), open.Options{}, []string{"p"}); err != nil {
					t.Fatal(err)
				}
			}
			q, err := u.Open(t.Context(), open.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer q.Close()
			passJob(t, q)
		})
	}
}
