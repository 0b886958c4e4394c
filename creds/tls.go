package creds

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

// ServerTLS is what a server shows and asks for.
type ServerTLS struct {
	// Cert and Key are PEM files, the certificate with what is between it and its
	// authority. Both, or neither for a server without TLS.
	Cert, Key string
	// ClientCA is a PEM file with the authorities of client certificates. "": none
	// are asked for.
	ClientCA string
	// RequireClient refuses connections without a client certificate.
	RequireClient bool
	// MinVersion is 1.2 or 1.3. "": 1.2.
	MinVersion string
	// Logger hears of files that changed. nil: nobody does.
	Logger *slog.Logger
}

// Enabled reports whether there is TLS.
func (o ServerTLS) Enabled() bool { return o.Cert != "" || o.Key != "" }

// Check says what does not fit together.
func (o ServerTLS) Check() error {
	switch {
	case (o.Cert == "") != (o.Key == ""):
		return errors.New("TLS takes a certificate and its key, one of them is missing")
	case !o.Enabled() && (o.ClientCA != "" || o.RequireClient):
		return errors.New("client certificates take TLS: a certificate and a key of the server are missing")
	case o.RequireClient && o.ClientCA == "":
		return errors.New("client certificates are required, and no authority for them is named")
	}
	_, err := tlsVersion(o.MinVersion)
	return err
}

func tlsVersion(s string) (uint16, error) {
	switch s {
	case "", "1.2":
		return tls.VersionTLS12, nil
	case "1.3":
		return tls.VersionTLS13, nil
	}
	return 0, fmt.Errorf("TLS version %q: want 1.2 or 1.3", s)
}

// Config is the configuration of a listener, which reads its files again when they
// change. An error is of the files as they are now; later ones are logged, and what
// was read last stays.
func (o ServerTLS) Config() (*tls.Config, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	version, err := tlsVersion(o.MinVersion)
	if err != nil {
		return nil, err
	}
	files := []string{o.Cert, o.Key}
	if o.ClientCA != "" {
		files = append(files, o.ClientCA)
	}
	r := newReloaded(files, o.Logger, func(data [][]byte) (*tls.Config, error) {
		cert, err := keyPair(data[0], data[1], o.Cert, o.Key)
		if err != nil {
			return nil, err
		}
		c := &tls.Config{MinVersion: version, Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}}
		if len(data) > 2 {
			if c.ClientCAs, err = pool(data[2], o.ClientCA); err != nil {
				return nil, err
			}
			c.ClientAuth = tls.VerifyClientCertIfGiven
			if o.RequireClient {
				c.ClientAuth = tls.RequireAndVerifyClientCert
			}
		}
		return c, nil
	})
	r.secrets = []string{o.Key}
	first, err := r.get()
	if err != nil {
		return nil, err
	}
	outer := first.Clone()
	// Sessions that were begun under an authority that is no longer trusted, or by a
	// client that showed nothing, are not gone on with.
	outer.SessionTicketsDisabled = true
	outer.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		c, err := r.get()
		if err != nil {
			return nil, err
		}
		c = c.Clone()
		c.SessionTicketsDisabled = true
		return c, nil
	}
	return outer, nil
}

// Credentials is Config for a gRPC server; nil without TLS.
func (o ServerTLS) Credentials() (credentials.TransportCredentials, error) {
	if err := o.Check(); err != nil || !o.Enabled() {
		return nil, err
	}
	c, err := o.Config()
	if err != nil {
		return nil, err
	}
	return credentials.NewTLS(c), nil
}

func keyPair(cert, key []byte, certFile, keyFile string) (tls.Certificate, error) {
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return pair, fmt.Errorf("certificate %s with key %s: %w", certFile, keyFile, err)
	}
	return pair, nil
}

func pool(data []byte, file string) (*x509.CertPool, error) {
	p := x509.NewCertPool()
	if !p.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("%s has no certificate in PEM form", file)
	}
	return p, nil
}

// lookEvery is how often files are looked at, at most: a handshake takes longer
// than reading them, and a thousand clients may come at once.
const lookEvery = time.Second

// reloaded is something made of files, made anew when they change.
type reloaded[T any] struct {
	files   []string
	secrets []string // those of them that nobody else should read
	log     *slog.Logger
	parse   func(data [][]byte) (T, error)

	mu     sync.Mutex
	looked time.Time
	data   [][]byte
	made   T
	there  bool
	last   string // the error that was logged last
}

func newReloaded[T any](files []string, log *slog.Logger, parse func(data [][]byte) (T, error)) *reloaded[T] {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &reloaded[T]{files: files, log: log, parse: parse}
}

// get is what the files have, or had when they were good last.
func (r *reloaded[T]) get() (T, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.there && time.Since(r.looked) < lookEvery {
		return r.made, nil
	}
	r.looked = time.Now()
	err := r.look()
	if err == nil || !r.there {
		return r.made, err
	}
	if err.Error() != r.last {
		r.log.Error("files for TLS or tokens can't be used, what was read before stays", "error", err)
		r.last = err.Error()
	}
	return r.made, nil
}

// look reads the files, which are small and on a local disk.
func (r *reloaded[T]) look() error {
	data := make([][]byte, len(r.files))
	same := r.there
	for i, path := range r.files {
		var err error
		if data[i], err = readFile(path); err != nil {
			return err
		}
		same = same && bytes.Equal(data[i], r.data[i])
	}
	if same {
		r.last = ""
		return nil
	}
	made, err := r.parse(data)
	if err != nil {
		return err
	}
	for _, path := range r.secrets {
		warnExposed(r.log, path)
	}
	if r.there {
		r.log.Info("files for TLS or tokens were read again", "files", r.files)
	}
	r.made, r.data, r.there, r.last = made, data, true, ""
	return nil
}

// token is the RPC credentials of a client.
type token struct {
	text      *reloaded[string]
	plaintext bool
}

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (t token) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	text, err := t.text.get()
	if err != nil {
		return nil, err
	}
	return map[string]string{"authorization": "Bearer " + text}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (t token) RequireTransportSecurity() bool { return !t.plaintext }
