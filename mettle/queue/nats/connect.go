package nats

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func (q *Queue) jetStream() (jetstream.JetStream, error) {
	if q.opts.Domain != "" {
		return jetstream.NewWithDomain(q.nc, q.opts.Domain, jetstream.WithDefaultTimeout(q.opts.Timeout))
	}
	return jetstream.New(q.nc, jetstream.WithDefaultTimeout(q.opts.Timeout))
}

// dialer is how to connect.
func (q *Queue) dialer() (natsgo.Options, error) {
	d := natsgo.GetDefaultOptions()
	d.Servers = q.opts.Servers
	d.User, d.Password, d.Token = q.opts.User, q.opts.Password, q.opts.Token
	d.Name = "mettle " + q.opts.Name
	d.Timeout = q.opts.Timeout
	d.MaxReconnect = -1 // for ever
	// Also where it is refused, time and again: a broker that is restarted may know
	// us again soon, and credentials that are renewed are read then.
	d.IgnoreAuthErrorAbort = true
	d.CustomReconnectDelayCB = q.reconnectDelay
	// A call that fails is tried again by us while its caller waits. What was
	// buffered would go out after the caller has been told that it failed.
	d.ReconnectBufSize = -1
	// A connection that looks alive is found out in half a minute.
	d.PingInterval, d.MaxPingsOut = 10*time.Second, 2
	d.DisconnectedErrCB = func(_ *natsgo.Conn, err error) {
		q.onDisconnect()
		if err != nil {
			q.log.Warn("connection to the broker lost", "error", err)
		}
	}
	d.ReconnectedCB = func(nc *natsgo.Conn) {
		q.metrics.reconnects.Inc()
		q.log.Info("connected to the broker again", "server", nc.ConnectedUrlRedacted())
		q.onReconnect()
	}
	d.AsyncErrorCB = func(_ *natsgo.Conn, _ *natsgo.Subscription, err error) {
		q.log.Warn("the broker reports an error", "error", err)
		if errors.Is(err, natsgo.ErrPermissionViolation) {
			q.mu.Lock()
			q.violation = err
			q.mu.Unlock()
		}
	}
	if err := q.secure(&d); err != nil {
		return d, err
	}
	if q.opts.CredentialsFile != "" {
		if err := natsgo.UserCredentials(q.opts.CredentialsFile)(&d); err != nil {
			return d, fmt.Errorf("nats queue: credentials: %w", err)
		}
	}
	return d, nil
}

// Reconnecting waits at first for as long as a server takes to restart, and in the
// end so long that twenty thousand processes are no load for one that is coming back.
const (
	firstReconnect = 500 * time.Millisecond
	lastReconnect  = 2 * time.Second
)

// reconnectDelay is the wait after all servers have been tried for the n-th time,
// from 1: up to half of it is by chance.
func (q *Queue) reconnectDelay(n int) time.Duration {
	d := min(firstReconnect<<min(max(n-1, 0), 8), lastReconnect, q.opts.Timeout/2)
	return d/2 + rand.N(d/2+1) //nolint:gosec // it spreads load and is no secret
}

// secure has connections be by TLS, where certificates are named. They are read
// anew for each connection: renewed ones need no restart.
func (q *Queue) secure(d *natsgo.Options) error {
	if q.opts.CAFile == "" && q.opts.CertFile == "" {
		return nil // by TLS where an address says so, with the system's certificates
	}
	d.Secure = true
	d.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	if file := q.opts.CAFile; file != "" {
		d.RootCAsCB = func() (*x509.CertPool, error) {
			pem, err := os.ReadFile(file)
			if err != nil {
				return nil, fmt.Errorf("nats queue: CA certificates: %w", err)
			}
			pool := x509.NewCertPool()
			if !pool.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("nats queue: CA certificates: there are none in %s", file)
			}
			return pool, nil
		}
		if _, err := d.RootCAsCB(); err != nil {
			return err // an operator's mistake, not one to try again
		}
	}
	if q.opts.CertFile == "" {
		return nil
	}
	d.TLSCertCB = func() (tls.Certificate, error) {
		c, err := tls.LoadX509KeyPair(q.opts.CertFile, q.opts.KeyFile)
		if err != nil {
			return c, fmt.Errorf("nats queue: own certificate: %w", err)
		}
		return c, nil
	}
	_, err := d.TLSCertCB()
	return err
}

// onReconnect wakes those who wait for jobs: what they asked the broker for is
// forgotten. For half a lease time no lease is taken for lapsed, so that workers
// who were cut off from the broker as we were can extend theirs.
func (q *Queue) onReconnect() {
	q.mu.Lock()
	defer q.mu.Unlock()
	close(q.reconnected)
	q.reconnected = make(chan struct{})
	q.graceUntil = time.Now().Add(q.opts.LeaseTime / 2)
	clear(q.consumers)
}
