package metrics

import (
	"fmt"
	"io"
	"log/slog"
)

// NewLogger returns a logger that writes to w, which the caller keeps, and
// whose writes need not be safe for concurrent use. The format is "text" or
// "json"; the level is debug, info, warn or error, in any case, with an offset
// if wanted ("info+2"). Empty strings mean text and info. The error names the
// value that is neither.
func NewLogger(w io.Writer, format, level string) (*slog.Logger, error) {
	o := &slog.HandlerOptions{Level: slog.LevelInfo}
	if level != "" {
		var l slog.Level
		if err := l.UnmarshalText([]byte(level)); err != nil {
			return nil, fmt.Errorf("log level %q is none of debug, info, warn, error: %w", level, err)
		}
		o.Level = l
	}
	switch format {
	case "", "text":
		return slog.New(slog.NewTextHandler(w, o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, o)), nil
	default:
		return nil, fmt.Errorf("log format %q is none of text, json", format)
	}
}
