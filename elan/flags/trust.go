package flags

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/metrics"
)

// Trust are the flags of the commands that serve clients, for them to embed: how
// the two sides show who they are, and what clients may do.
type Trust struct {
	TLSCert           string `name:"tls_cert" help:"The server's certificate, a PEM file, with those between it and its authority. It is read again when it changes, as are the files below." type:"path" placeholder:"FILE"`
	TLSKey            string `name:"tls_key" help:"The key of --tls_cert, a PEM file." type:"path" placeholder:"FILE"`
	TLSMinVersion     string `name:"tls_min_version" help:"The oldest TLS that is spoken: 1.2 or 1.3." enum:"1.2,1.3" default:"1.2"`
	TLSClientCA       string `name:"tls_client_ca" help:"The authorities of client certificates, a PEM file. Clients may show one then." type:"path" placeholder:"FILE"`
	TLSClientRequired bool   `name:"tls_client_required" help:"Refuse clients without a certificate."`
	Policy            string `help:"Who may do what: a YAML file with tokens, issuers of tokens, certificates and their rights, see creds/README.md. It is read again when it changes. Without one everybody may do everything." type:"path" placeholder:"FILE"`
	PlaintextTokens   bool   `help:"Take tokens from other machines also without TLS, where something in front of this server ends TLS."`
	AuditLog          string `help:"A file that gets a line of JSON for each result that a client sets and each call of an administrator; - is standard error." placeholder:"FILE"`
}

// server is the TLS part.
func (t Trust) server(log *slog.Logger) creds.ServerTLS {
	return creds.ServerTLS{
		Cert: t.TLSCert, Key: t.TLSKey, ClientCA: t.TLSClientCA, RequireClient: t.TLSClientRequired, MinVersion: t.TLSMinVersion, Logger: log,
	}
}

// Check is for the commands' Validate.
func (t Trust) Check() error {
	if err := t.server(nil).Check(); err != nil {
		return fmt.Errorf("--tls_cert, --tls_key, --tls_client_ca, --tls_client_required: %w", err)
	}
	if t.Policy == "" && t.AuditLog != "" {
		return errors.New("--audit_log: it says who did what, which takes a --policy")
	}
	return nil
}

// Scheme is how clients name the server.
func (t Trust) Scheme() string {
	if t.server(nil).Enabled() {
		return "grpcs"
	}
	return "grpc"
}

// Address is how commands of ours name a server that listens at addr.
func (t Trust) Address(addr net.Addr) string {
	if t.Scheme() == "grpcs" {
		return "grpcs://" + Reachable(addr)
	}
	return Reachable(addr)
}

// Reachable is where clients find a server that listens at addr: one that listens
// at all addresses of its machine, as by --host=0.0.0.0, goes by the machine's name,
// since 0.0.0.0 and [::] stand for no machine that a client could call.
func Reachable(addr net.Addr) string {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok || len(tcp.IP) > 0 && !tcp.IP.IsUnspecified() {
		return addr.String()
	}
	host, err := os.Hostname()
	if err != nil || host == "" {
		host = "localhost"
	}
	return net.JoinHostPort(host, strconv.Itoa(tcp.Port))
}

// GuardOptions are those of Trust.Guard.
type GuardOptions struct {
	// Addr is where the server listens.
	Addr net.Addr
	// OperationInstance: see creds.Options.
	OperationInstance func(name string) (string, error)
	Logger            *slog.Logger
	Registerer        prometheus.Registerer
}

// Guarded is what the flags come to. The zero Guarded lets everybody do everything.
type Guarded struct {
	// ServerOptions go behind those of metrics.
	ServerOptions []grpc.ServerOption
	guard         *creds.Guard
	closeAudit    func() error
}

// tlsReadBytes is gRPC's read buffer where there is TLS, which each connection holds
// also while it is idle; without TLS none does. A read brings a TLS record at most,
// 16 KiB, so that a larger buffer saves no call.
const tlsReadBytes = 32 << 10

// Guard reads the files.
func (t Trust) Guard(o GuardOptions) (*Guarded, error) {
	g := &Guarded{}
	if err := creds.Watch(o.Registerer,
		creds.File{Use: "server", Path: t.TLSCert, Key: t.TLSKey}, creds.File{Use: "client_ca", Path: t.TLSClientCA}, creds.PolicyFile(t.Policy),
	); err != nil {
		return nil, err
	}
	tls, err := t.server(o.Logger).Credentials()
	if err != nil {
		return nil, err
	}
	if tls != nil {
		g.ServerOptions = append(g.ServerOptions, grpc.Creds(tls), grpc.ReadBufferSize(tlsReadBytes))
	}
	if t.Policy == "" {
		t.warn(o)
		return g, nil
	}
	options := creds.Options{
		Policy: t.Policy, PlaintextTokens: t.PlaintextTokens, Canonical: canonical, OperationInstance: o.OperationInstance,
		Logger: o.Logger, Registerer: o.Registerer,
	}
	if t.AuditLog != "" {
		if options.Audit, g.closeAudit, err = creds.AuditLog(t.AuditLog); err != nil {
			return nil, fmt.Errorf("--audit_log: %w", err)
		}
	}
	if g.guard, err = creds.New(options); err != nil {
		return nil, errors.Join(fmt.Errorf("--policy: %w", err), g.Close())
	}
	if g.guard.HasTokens() && tls == nil && !t.PlaintextTokens && !onLoopback(o.Addr) {
		return nil, errors.Join(fmt.Errorf("--policy has tokens, and %v can be reached over a network, where they could be read on the way: give --tls_cert and --tls_key, "+
			"or --plaintext_tokens where something in front of this server ends TLS", o.Addr), g.Close())
	}
	g.ServerOptions = append(g.ServerOptions, append(g.guard.ServerOptions(), grpc.ChainUnaryInterceptor(callerUnary), grpc.ChainStreamInterceptor(callerStream))...)
	return g, nil
}

// warn says who may call a server that has no policy, where that is more than this
// machine.
func (t Trust) warn(o GuardOptions) {
	if o.Logger == nil || t.TLSClientRequired || onLoopback(o.Addr) {
		return
	}
	o.Logger.Warn("whoever reaches this server may do everything: --policy says who may do what", "address", o.Addr)
}

// onLoopback reports whether addr is known to be reached from this machine only.
func onLoopback(addr net.Addr) bool {
	tcp, ok := addr.(*net.TCPAddr)
	return ok && tcp.IP.IsLoopback()
}

// callerUnary and callerStream have log lines tell of who calls.
func callerUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
	setCaller(ctx)
	return h(ctx, req)
}

func callerStream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
	setCaller(ss.Context())
	return h(srv, ss)
}

func setCaller(ctx context.Context) {
	if id := creds.From(ctx); id != nil {
		metrics.SetCaller(ctx, id.Name)
	}
}

// canonical is the instance whose failed results an instance has.
func canonical(instance string) string {
	if i, ok := action.CutFailedInstance(instance); ok {
		return i
	}
	return instance
}

// admit is for the Gate in front of the server.
func (g *Guarded) admit() func(context.Context, string) error {
	if g.guard == nil {
		return nil
	}
	return g.guard.Admit
}

// Enforced reports whether there is a policy, so that a right protects what would
// otherwise be kept to this machine.
func (g *Guarded) Enforced() bool { return g.guard != nil }

// Run reads the policy again when it changes, until ctx is done.
func (g *Guarded) Run(ctx context.Context) error {
	if g.guard == nil {
		<-ctx.Done()
		return nil
	}
	return g.guard.Run(ctx)
}

// Caller is the name of whom the call of ctx is for, "" where nobody asked, and of the
// server that makes it in that one's place, if one does.
func (g *Guarded) Caller(ctx context.Context) (name, via string) {
	id := creds.From(ctx)
	switch {
	case id == nil:
		return "", ""
	case id.For != "":
		return id.For, id.Name
	}
	return id.Name, ""
}

// CallerText is Caller as one text, for a server that is called next: as much of it as
// that one takes.
func (g *Guarded) CallerText(ctx context.Context) string {
	name, via := g.Caller(ctx)
	if via == "" {
		return name
	}
	if text := name + " via " + via; len(text) <= creds.MaxForBytes {
		return text
	}
	return name
}

// Files are those that the policy names, with tokens for instance.
func (g *Guarded) Files() []string {
	if g.guard == nil {
		return nil
	}
	return g.guard.Files()
}

// Close closes the audit log.
func (g *Guarded) Close() error {
	if g.closeAudit == nil {
		return nil
	}
	return g.closeAudit()
}

// Caller are the flags of the commands that call servers, for them to embed.
type Caller struct {
	TLSCA         string `name:"tls_ca" help:"The authorities of the server, a PEM file, for TLS with it. Default: those of the system, where the address begins with grpcs://." type:"path" placeholder:"FILE"`
	TLSCert       string `name:"tls_client_cert" help:"The certificate to show to the server, a PEM file." type:"path" placeholder:"FILE"`
	TLSKey        string `name:"tls_client_key" help:"The key of that certificate, a PEM file." type:"path" placeholder:"FILE"`
	TLSServerName string `name:"tls_server_name" help:"Whom the server's certificate is for, where that is not the host that is called." placeholder:"NAME"`
	TokenFile     string `help:"A file with the bearer token to send, which is read again when it changes." type:"path" placeholder:"FILE"`
	PlainToken    bool   `name:"plaintext_token" help:"Send the token also without TLS to another machine."`
}

// Dial says how to reach a server, or several by commas: the address without its
// schemes, and what connections to it take.
func (c Caller) Dial(addr string, log *slog.Logger) (target string, opts []grpc.DialOption, err error) {
	client := c.client(log)
	targets := strings.Split(addr, ",")
	for i, t := range targets {
		t = strings.TrimSpace(t)
		if secure, ok := strings.CutPrefix(t, "grpcs://"); ok {
			client.TLS, t = true, secure
		} else if plain, ok := strings.CutPrefix(t, "grpc://"); ok && client.Encrypted() {
			return "", nil, fmt.Errorf("grpc://%s is without TLS, and TLS is asked for: say grpcs://%s", plain, plain)
		}
		targets[i] = strings.TrimPrefix(t, "grpc://")
	}
	if err := client.Check(targets...); err != nil {
		return "", nil, err
	}
	opts, err = client.DialOptions()
	return strings.Join(targets, ","), opts, err
}

// Watch has metrics tell of the files, which are for calls of what use names.
func (c Caller) Watch(r prometheus.Registerer, use string) error {
	return creds.Watch(r,
		creds.File{Use: use, Path: c.TLSCert, Key: c.TLSKey}, creds.File{Use: use + "_ca", Path: c.TLSCA}, creds.TokenFile(use+"_token", c.TokenFile))
}

// Encrypted reports whether all servers of an address are called over TLS.
func (c Caller) Encrypted(addr string) bool {
	return c.client(nil).Encrypted() || !slices.ContainsFunc(strings.Split(addr, ","), func(t string) bool {
		return !strings.HasPrefix(strings.TrimSpace(t), "grpcs://")
	})
}

func (c Caller) client(log *slog.Logger) creds.Client {
	return creds.Client{
		CA: c.TLSCA, Cert: c.TLSCert, Key: c.TLSKey, ServerName: c.TLSServerName, TokenFile: c.TokenFile, PlaintextToken: c.PlainToken, Logger: log,
	}
}
