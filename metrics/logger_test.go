package metrics_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/metrics"
)

func TestNewLogger(t *testing.T) {
	for _, tc := range []struct {
		name, format, level string
		want                []string
		absent              string
	}{
		{"defaults", "", "", []string{"level=INFO msg=told worker=w1", "level=WARN"}, "quiet"},
		{"json", "json", "INFO", []string{`"msg":"told","worker":"w1"`}, "quiet"},
		{"debug", "text", "debug", []string{"quiet", "told"}, "absent"},
		{"between levels", "text", "info+2", []string{"loud"}, "told"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var b bytes.Buffer
			l, err := metrics.NewLogger(&b, tc.format, tc.level)
			if err != nil {
				t.Fatal(err)
			}
			l.Debug("quiet")
			l.Info("told", "worker", "w1")
			l.Warn("loud")
			for _, w := range tc.want {
				if !strings.Contains(b.String(), w) {
					t.Errorf("%q lacks %q", b.String(), w)
				}
			}
			if strings.Contains(b.String(), tc.absent) {
				t.Errorf("%q has %q", b.String(), tc.absent)
			}
		})
	}
}

func TestNewLogger_refuses(t *testing.T) {
	for _, tc := range []struct{ name, format, level, want string }{
		{"format", "xml", "info", `"xml"`},
		{"level", "text", "loud", `"loud"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := metrics.NewLogger(new(bytes.Buffer), tc.format, tc.level); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one that names %s", err, tc.want)
			}
		})
	}
}
