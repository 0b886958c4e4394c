package creds

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// Client is what a client shows and asks for.
type Client struct {
	// TLS asks for TLS where no other field does.
	TLS bool
	// CA is a PEM file with the authorities of servers. "": those of the system.
	CA string
	// Cert and Key are the client's own, PEM files. Both, or neither.
	Cert, Key string
	// ServerName is whom the server's certificate is to be for, where that is not the
	// host that is called.
	ServerName string
	// TokenFile has a bearer token, which is read again when it changes.
	TokenFile string
	// PlaintextToken sends the token also without TLS to other machines.
	PlaintextToken bool
	// Logger hears of files that changed. nil: nobody does.
	Logger *slog.Logger
}

// Encrypted reports whether there is TLS.
func (o Client) Encrypted() bool { return o.TLS || o.CA != "" || o.Cert != "" || o.ServerName != "" }

// Check says what does not fit together, for a connection to targets, which are
// HOST:PORT with or without a scheme of gRPC.
func (o Client) Check(targets ...string) error {
	if (o.Cert == "") != (o.Key == "") {
		return errors.New("a client certificate has a key, one of the two is missing")
	}
	if o.TokenFile == "" || o.Encrypted() || o.PlaintextToken {
		return nil
	}
	for _, t := range targets {
		if !isLoopbackTarget(t) {
			return fmt.Errorf("a token would be sent to %s without TLS, and could be read on the way: call grpcs://, or name the server's authority", t)
		}
	}
	return nil
}

// DialOptions are those of the connections. An error is of the files as they are
// now.
func (o Client) DialOptions() ([]grpc.DialOption, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	var opts []grpc.DialOption
	if o.Encrypted() {
		h, err := o.handshakes()
		if err != nil {
			return nil, err
		}
		opts = append(opts, grpc.WithTransportCredentials(h))
	}
	if o.TokenFile == "" {
		return opts, nil
	}
	r := o.reloadedToken()
	if _, err := r.get(); err != nil {
		return nil, err
	}
	// Check has seen to it that without TLS the token stays on this machine.
	return append(opts, grpc.WithPerRPCCredentials(token{text: r, plaintext: !o.Encrypted()})), nil
}

// reloadedToken is what TokenFile has.
func (o Client) reloadedToken() *reloaded[string] {
	r := newReloaded([]string{o.TokenFile}, o.Logger, func(data [][]byte) (string, error) { return tokenIn(o.TokenFile, data[0]) })
	r.secrets = []string{o.TokenFile}
	return r
}

// tokenIn is the token in the data of a file.
func tokenIn(path string, data []byte) (string, error) {
	fields := bytes.Fields(data)
	if len(fields) != 1 {
		return "", fmt.Errorf("token file %s: there are %d words in it, want one token", path, len(fields))
	}
	if i := bytes.IndexFunc(fields[0], func(r rune) bool { return r <= ' ' || r > '~' }); i >= 0 {
		return "", fmt.Errorf("token file %s: the token has a character that no header can have, at position %d", path, i)
	}
	return string(fields[0]), nil
}

// handshakes are TLS whose files are read again when they change, at the next
// handshake.
type handshakes struct {
	credentials.TransportCredentials // made of the files as they were first
	config                           func() (*tls.Config, error)
}

// ClientHandshake implements credentials.TransportCredentials.
func (h *handshakes) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, err := h.config()
	if err != nil {
		return nil, nil, err
	}
	return credentials.NewTLS(c).ClientHandshake(ctx, authority, raw)
}

// Clone implements credentials.TransportCredentials.
func (h *handshakes) Clone() credentials.TransportCredentials {
	return &handshakes{h.TransportCredentials.Clone(), h.config}
}

func (o Client) handshakes() (*handshakes, error) {
	var files []string
	if o.CA != "" {
		files = append(files, o.CA)
	}
	if o.Cert != "" {
		files = append(files, o.Cert, o.Key)
	}
	r := newReloaded(files, o.Logger, func(data [][]byte) (*tls.Config, error) {
		c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: o.ServerName}
		if o.CA != "" {
			var err error
			if c.RootCAs, err = pool(data[0], o.CA); err != nil {
				return nil, err
			}
			data = data[1:]
		}
		if o.Cert != "" {
			cert, err := keyPair(data[0], data[1], o.Cert, o.Key)
			if err != nil {
				return nil, err
			}
			c.Certificates = []tls.Certificate{cert}
		}
		return c, nil
	})
	if o.Key != "" {
		r.secrets = []string{o.Key}
	}
	c, err := r.get()
	if err != nil {
		return nil, err
	}
	return &handshakes{credentials.NewTLS(c), r.get}, nil
}

// isLoopbackTarget reports whether a target of gRPC is this machine.
func isLoopbackTarget(target string) bool {
	if strings.HasPrefix(target, "unix:") {
		return true
	}
	if i := strings.LastIndex(target, "/"); i >= 0 {
		target = target[i+1:]
	}
	host, _, err := net.SplitHostPort(target)
	if err != nil {
		host = target
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
