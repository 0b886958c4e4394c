package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// What is wrong on the command line is said with what would be right, before
// anything is begun.
func TestRun_wrongFlags(t *testing.T) {
	const queue, storage = "--queue=nats://localhost:4222/p", "--storage=localhost:7777"
	for _, tc := range []struct {
		name string
		args []string
		want []string // in the error
	}{
		{"api with nothing", []string{"api"}, []string{"--queue: no queue is named, want nats://HOST:4222/PREFIX", "--storage: none is named, want HOST:PORT"}},
		{"memory as a queue", []string{"api", "--queue=mem://", storage}, []string{"--queue: mem:// is a queue within one process"}},
		{"another broker", []string{"worker", "--queue=kafka://x", storage}, []string{"kafka://", "gcppubsub://PROJECT/PREFIX"}},
		{"a bucket as the storage", []string{"worker", queue, "--storage=gs://bucket"}, []string{`--storage: "gs://bucket"`, "HOST:PORT of an elan"}},
		{"no port", []string{"api", queue, "--storage=a:1,b"}, []string{`--storage: "b"`}},
		{"an empty address", []string{"api", queue, "--storage=a:1,"}, []string{"--storage", "comma"}},
		{"no pool", []string{"worker", queue, storage, "--pool="}, []string{"--pool: it has no name"}},
		{"slots", []string{"worker", queue, storage, "--slots=-1"}, []string{"--slots: -1 is negative"}},
		{"CPUs that are no number", []string{"worker", queue, storage, "--action_cpus=nan"}, []string{"--action_cpus: NaN"}},
		{"CPUs without end", []string{"worker", queue, storage, "--action_cpus=inf"}, []string{"--action_cpus: +Inf"}},
		{"root as a slot's user", []string{"worker", queue, storage, "--uid_base=0"}, []string{"--uid_base: 0 is no user for actions"}},
		{"drain timeout", []string{"worker", queue, storage, "--drain_timeout=-1s"}, []string{"--drain_timeout: -1s is negative"}},
		{"timeouts", []string{"api", queue, storage, "--default_timeout=48h"}, []string{"--default_timeout: 48h0m0s", "--max_timeout, 24h0m0s"}},
		{"abandon", []string{"api", queue, storage, "--abandon_after=0s"}, []string{"--abandon_after: 0s is not above 0"}},
		{"a relative path to hide", []string{"worker", queue, storage, "--sandbox_hide=x"}, []string{`--sandbox_hide: "x" is no clean absolute path`}},
		{"nothing to show", []string{"worker", queue, storage, "--sandbox_show=/no/such"}, []string{"--sandbox_show", "/no/such"}},
		{"a registry by URL", []string{"worker", queue, storage, "--image_registries=https://ghcr.io"}, []string{`--image_registries: "https://ghcr.io" is no HOST or HOST/PREFIX`}},
		{"no credentials for registries", []string{"worker", queue, storage, "--image_auth=/no/such"}, []string{"--image_auth", "/no/such"}},
		{"setup with nothing", []string{"setup"}, []string{"--queue"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			if status := run(tc.args, &stdout, &stderr); status != 2 {
				t.Errorf("exit status %d, want 2\n%s", status, &stderr)
			}
			for _, want := range tc.want {
				if !strings.Contains(stderr.String(), want) {
					t.Errorf("%q is not in %s", want, &stderr)
				}
			}
		})
	}
}

func TestStorageFlags_check(t *testing.T) {
	for _, tc := range []struct {
		storage string
		want    []string
	}{
		{"localhost:7777", []string{"localhost:7777"}},
		{"grpc://a:1", []string{"a:1"}},
		{"a:1, b:2", []string{"a:1", "b:2"}},
		{"dns:///elan:7777", []string{"dns:///elan:7777"}},
		{"[::1]:7777", []string{"[::1]:7777"}},
	} {
		f := storageFlags{Storage: tc.storage}
		if err := f.check(); err != nil || !slices.Equal(f.targets, tc.want) {
			t.Errorf("%s: %v, %v, want %v", tc.storage, f.targets, err, tc.want)
		}
	}
}

// Each need that is not met is named, all are asked at once, and what is waited
// for is said once, and when it is there.
func TestNeeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		away := func(ctx context.Context) error {
			if time.Since(begun) > 10*time.Second {
				return nil
			}
			time.Sleep(time.Second)
			return errors.New("away")
		}
		n := needs{{"queue q", away}, {"storage s", away}, {"third", func(context.Context) error { return nil }}}
		err := n.ready(t.Context())
		if err == nil || err.Error() != "queue q: away\nstorage s: away" || time.Since(begun) != time.Second {
			t.Errorf("ready: %v after %v", err, time.Since(begun))
		}
		var log bytes.Buffer
		if err := n.report(t.Context(), slog.New(slog.NewTextHandler(&log, nil))); err != nil {
			t.Error(err)
		}
		if lines := strings.Split(strings.TrimSpace(log.String()), "\n"); len(lines) != 2 || !strings.Contains(lines[0], "waiting") || !strings.Contains(lines[1], "answer") {
			t.Errorf("the log is\n%s", &log)
		}
	})
}

// The first signal is not the second, nor is one that comes with it.
func TestSecondSignal(t *testing.T) {
	second, stop := secondSignal()
	defer stop()
	kill := func() {
		t.Helper()
		if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	kill()
	kill()
	select {
	case <-second:
		t.Fatal("the first signal is taken for the second")
	case <-time.After(50 * time.Millisecond): // would be enough
	}
	time.Sleep(signalRepeat)
	kill()
	select {
	case <-second:
	case <-time.After(time.Minute):
		t.Fatal("the second signal was not heard")
	}
}

func TestClosers(t *testing.T) {
	var c closers
	var order []int
	for i := range 3 {
		c.add(func() error {
			order = append(order, i)
			return nil
		})
	}
	c.add(func() error { return errors.New("broken") })
	if err := c.close(); err == nil || !slices.Equal(order, []int{2, 1, 0}) {
		t.Errorf("closed %v, %v; want the last first, and the error", order, err)
	}
	if err := c.close(); err != nil || len(order) != 3 {
		t.Errorf("closed again: %v, %v", order, err)
	}
}
