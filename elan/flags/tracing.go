package flags

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/metrics/tracing"
)

// Tracing are the flags of the commands that serve or run actions, as the field of
// another struct: where traces go.
type Tracing struct {
	OTLP   string  `name:"trace_otlp" help:"The collector to which traces go, by OpenTelemetry's protocol: grpc://HOST:4317, or grpcs:// with TLS, or http://HOST:4318/v1/traces, or https://. Default: the one of OTEL_EXPORTER_OTLP_ENDPOINT; without either there are no traces." placeholder:"URL"`
	Share  float64 `name:"trace_share" help:"Which share of the builds is traced, each as a whole, from 0 to 1, as in 0.01. Clients that send a traceparent header say for themselves." default:"1"`
	Caller Caller  `embed:"" prefix:"trace_"`
}

// Check is for the commands' Validate.
func (f Tracing) Check() error {
	if !(f.Share >= 0 && f.Share <= 1) { // NaN is neither
		return fmt.Errorf("--trace_share: %v is not between 0 and 1", f.Share)
	}
	if f.OTLP == "" {
		return nil
	}
	if err := tracing.CheckURL(f.OTLP); err != nil {
		return fmt.Errorf("--trace_otlp: %q: %w", f.OTLP, err)
	}
	if err := f.client(f.OTLP, nil).Check(hostOf(f.OTLP)); err != nil {
		return fmt.Errorf("--trace_otlp: %w", err)
	}
	return nil
}

// client is how the collector of a URL is called.
func (f Tracing) client(collector string, log *slog.Logger) creds.Client {
	c := f.Caller.client(log)
	c.TLS = strings.HasPrefix(collector, "grpcs://") || strings.HasPrefix(collector, "https://")
	return c
}

func hostOf(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		return s
	}
	return u.Host
}

// TracerOptions are those of Tracing.Tracer.
type TracerOptions struct {
	// Service, Version and Instance say who sends. The Instance is the host's name
	// where it is "".
	Service, Version, Instance string
	// Prefix begins the name of the metric.
	Prefix     string
	Registerer prometheus.Registerer
	Logger     *slog.Logger
}

// Tracer is what the flags come to. The caller closes it, after all that it traces.
func (f Tracing) Tracer(ctx context.Context, o TracerOptions) (*tracing.Tracer, error) {
	if f.OTLP == "" {
		if err := f.fromEnvironment(os.Getenv); err != nil {
			return nil, err
		}
	}
	if o.Instance == "" {
		o.Instance, _ = os.Hostname() // it informs
	}
	options := tracing.Options{
		URL: f.OTLP, Share: f.Share, Service: o.Service, Version: o.Version, Instance: o.Instance,
		Prefix: o.Prefix, Registerer: o.Registerer, Logger: o.Logger,
	}
	if f.OTLP != "" {
		var err error
		client := f.client(f.OTLP, o.Logger)
		if err := client.Check(hostOf(f.OTLP)); err != nil {
			return nil, fmt.Errorf("--trace_otlp: %w", err)
		}
		if strings.HasPrefix(f.OTLP, "grpc") {
			options.Dial, err = client.DialOptions()
		} else {
			options.HTTP, err = client.Transport()
		}
		if err != nil {
			return nil, fmt.Errorf("--trace_otlp: %w", err)
		}
	}
	return tracing.New(ctx, options)
}

// Secrets are the files that nobody but the process is to read.
func (f Tracing) Secrets() []string {
	if f.OTLP == "" && f.fromEnvironment(os.Getenv) != nil {
		return nil // Tracer says so
	}
	return []string{f.Caller.TLSKey, f.Caller.TokenFile}
}

// fromEnvironment fills in what OpenTelemetry's own variables say, which are set for
// all programs of a machine or a cluster.
func (f *Tracing) fromEnvironment(get func(string) string) error {
	either := func(name string) string {
		if v := get("OTEL_EXPORTER_OTLP_TRACES_" + name); v != "" {
			return v
		}
		return get("OTEL_EXPORTER_OTLP_" + name)
	}
	endpoint := either("ENDPOINT")
	if exporter := get("OTEL_TRACES_EXPORTER"); endpoint == "" || strings.EqualFold(get("OTEL_SDK_DISABLED"), "true") || exporter != "" && exporter != "otlp" {
		return nil
	}
	u, err := url.Parse(endpoint)
	if err != nil {
		return fmt.Errorf("OTEL_EXPORTER_OTLP_ENDPOINT: %w", err)
	}
	switch protocol := either("PROTOCOL"); protocol {
	case "grpc":
		switch u.Scheme {
		case "http":
			u.Scheme = "grpc"
		case "https":
			u.Scheme = "grpcs"
		}
		u.Path = ""
	case "", "http/protobuf": // the default of the specification
		if get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") == "" {
			u = u.JoinPath("v1/traces")
		}
	default:
		return fmt.Errorf("OTEL_EXPORTER_OTLP_PROTOCOL: %q is none of grpc, http/protobuf", protocol)
	}
	if err := tracing.CheckURL(u.String()); err != nil {
		return fmt.Errorf("OTEL_EXPORTER_OTLP_ENDPOINT: %q: %w", endpoint, err)
	}
	f.OTLP = u.String()
	for _, v := range []struct {
		to   *string
		name string
	}{{&f.Caller.TLSCA, "CERTIFICATE"}, {&f.Caller.TLSCert, "CLIENT_CERTIFICATE"}, {&f.Caller.TLSKey, "CLIENT_KEY"}} {
		if *v.to == "" {
			*v.to = either(v.name)
		}
	}
	if (f.Caller.TLSCert == "") != (f.Caller.TLSKey == "") {
		return errors.New("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE: a certificate has a key, one of the two is missing")
	}
	return nil
}
