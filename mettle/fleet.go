package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/open"
)

// What the parts of a fleet have in common: the queue at which they meet, what
// they can't do without, and signals.

// queueFlags are those of all who meet at a broker.
type queueFlags struct {
	Queue string `help:"The broker at which API servers and workers meet: nats://HOST:4222/PREFIX, tls://HOST:4222/PREFIX or gcppubsub://PROJECT/PREFIX. Settings go behind the URL, as in ?lease=60s&attempts=3." placeholder:"URL"`

	url *open.URL // set by check
}

func (f *queueFlags) check() (err error) {
	if f.url, err = open.ParseURL(f.Queue); err != nil {
		return fmt.Errorf("--queue: %w", err)
	}
	return nil
}

// queueOptions are those of queueFlags.open.
type queueOptions struct {
	worker   string // its name; empty: an API server
	log      *slog.Logger
	registry *prometheus.Registry
}

// open connects to the broker, which the caller closes. One that is away is
// waited for in the background.
func (f *queueFlags) open(ctx context.Context, o queueOptions) (queue.Broker, error) {
	if err := f.watch(o.registry); err != nil {
		return nil, err
	}
	return f.url.Open(ctx, open.Options{Name: o.worker, Logger: o.log, Registerer: o.registry})
}

// watch has metrics tell of the files that --queue names.
func (f *queueFlags) watch(registry *prometheus.Registry) error {
	_, query, _ := strings.Cut(f.Queue, "?")
	values, err := url.ParseQuery(query)
	if err != nil {
		return err
	}
	return creds.Watch(registry,
		creds.File{Use: "queue", Path: values.Get("cert"), Key: values.Get("key")}, creds.File{Use: "queue_ca", Path: values.Get("ca")},
		creds.File{Use: "queue_credentials", Path: values.Get("credentials"), Opaque: true})
}

// needs are what a process can't do its work without.
type needs []need

type need struct {
	name  string
	ready func(context.Context) error
}

// ready asks all at once, and returns nil if all are well. The error names each
// that is not.
func (n needs) ready(ctx context.Context) error {
	errs := make([]error, len(n))
	var group sync.WaitGroup
	for i, d := range n {
		group.Go(func() {
			if err := d.ready(ctx); err != nil {
				errs[i] = fmt.Errorf("%s: %w", d.name, err)
			}
		})
	}
	group.Wait()
	return errors.Join(errs...)
}

const (
	// needsTimeout bounds one question of report, as /readyz bounds its own.
	needsTimeout = 5 * time.Second
	// needsPoll is the wait between two of them.
	needsPoll = time.Second
)

// report says what a process that has started waits for, and when it is there.
// It returns when that is so, or ctx is done.
func (n needs) report(ctx context.Context, log *slog.Logger) error {
	said := ""
	for ctx.Err() == nil {
		asking, cancel := context.WithTimeout(ctx, needsTimeout)
		err := n.ready(asking)
		cancel()
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			if said != "" {
				log.InfoContext(ctx, "queue and storage answer")
			}
			return nil
		case err.Error() != said:
			said = err.Error()
			log.WarnContext(ctx, "waiting for queue and storage", "error", err)
		}
		select {
		case <-time.After(needsPoll):
		case <-ctx.Done():
		}
	}
	return nil
}

// readyDuring is what /readyz says: as ready does, and not once life is over.
func readyDuring(life context.Context, ready func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		if life.Err() != nil {
			return errors.New("shutting down")
		}
		return ready(ctx)
	}
}

// signalRepeat is within what time a second signal is the first once more: some
// send it to a process and to its group, as timeout(1) does.
const signalRepeat = 300 * time.Millisecond

// secondSignal is closed at the second SIGINT or SIGTERM from now on. A third ends
// the process at once, and so does the next after stop, which the caller calls.
func secondSignal() (second <-chan struct{}, stop func()) {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	hurry, done := make(chan struct{}), make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		var first time.Time
		for n := 0; n < 2; {
			select {
			case <-signals:
			case <-done:
				return
			}
			if n == 0 {
				first = time.Now()
			}
			if n == 0 || time.Since(first) > signalRepeat {
				n++
			}
		}
		signal.Stop(signals)
		close(hurry)
	}()
	return hurry, func() {
		signal.Stop(signals)
		close(done)
		<-ended
	}
}
