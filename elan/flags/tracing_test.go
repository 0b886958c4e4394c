package flags_test

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/flags"
)

func TestTracing_Check(t *testing.T) {
	for _, tc := range []struct {
		name string
		f    flags.Tracing
		want string // in the error; "": there is none
	}{
		{"nothing", flags.Tracing{Share: 1}, ""},
		{"gRPC", flags.Tracing{OTLP: "grpc://tempo:4317", Share: 0.01}, ""},
		{"HTTP", flags.Tracing{OTLP: "https://tempo:4318/v1/traces", Share: 0}, ""},
		{"another scheme", flags.Tracing{OTLP: "tempo:4317"}, `--trace_otlp: "tempo:4317": want grpc://HOST:PORT`},
		{"a share", flags.Tracing{Share: 100}, "--trace_share: 100"},
		{"a token that others could read", flags.Tracing{OTLP: "http://tempo:4318/v1/traces", Caller: flags.Caller{TokenFile: "t"}}, "without TLS"},
		{"a certificate without a key", flags.Tracing{OTLP: "grpcs://tempo:4317", Caller: flags.Caller{TLSCert: "c"}}, "key"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := tc.f.Check(); (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
}

// What OpenTelemetry's own variables say counts where the flag is absent.
func TestTracing_environment(t *testing.T) {
	for _, tc := range []struct {
		name string
		flag string
		env  map[string]string
		on   bool
		want string // in the error; "": there is none
	}{
		{"nothing", "", nil, false, ""},
		{"the flag", "grpc://localhost:4317", map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "://"}, true, ""},
		{"HTTP, by default", "", map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}, true, ""},
		{"gRPC", "", map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, true, ""},
		{"for traces alone", "", map[string]string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://localhost:4318/x", "OTEL_EXPORTER_OTLP_ENDPOINT": "://"}, true, ""},
		{"disabled", "", map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318", "OTEL_SDK_DISABLED": "true"}, false, ""},
		{"another exporter", "", map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318", "OTEL_TRACES_EXPORTER": "none"}, false, ""},
		{"JSON", "", map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, false, "OTEL_EXPORTER_OTLP_PROTOCOL"},
		{"no URL", "", map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4318"}, false, "OTEL_EXPORTER_OTLP_ENDPOINT"},
		{"an authority that is not there", "", map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "https://localhost:4318", "OTEL_EXPORTER_OTLP_CERTIFICATE": "/no/such"}, false, "/no/such"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for k, v := range tc.env {
				t.Setenv(k, v)
			}
			tr, err := flags.Tracing{OTLP: tc.flag, Share: 1}.Tracer(t.Context(), flags.TracerOptions{
				Service: "s", Prefix: "test", Registerer: prometheus.NewRegistry(),
			})
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("%v, want %q", err, tc.want)
			}
			if tr.On() != tc.on {
				t.Errorf("traces are made: %v, want %v", tr.On(), tc.on)
			}
			if err := tr.Close(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}
