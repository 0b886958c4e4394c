package metrics

import (
	"context"
	"fmt"
	"io"
	"log/slog"
)

// NewLogger returns a logger that writes to w, which the caller keeps, and
// whose writes need not be safe for concurrent use. The format is "text" or
// "json"; the level is debug, info, warn or error, in any case, with an offset
// if wanted ("info+2"). Empty strings mean text and info. The error names the
// value that is neither.
//
// Lines whose context is that of a call tell of it what Attrs does, its trace_id
// where it is part of a trace that is recorded, and what the fields give for their
// context. Of what is logged over and over, at info and
// above, some lines are left out: the next of that message says how many, as
// suppressed.
func NewLogger(w io.Writer, format, level string, fields ...func(context.Context) []slog.Attr) (*slog.Logger, error) {
	o := &slog.HandlerOptions{Level: slog.LevelInfo}
	if level != "" {
		var l slog.Level
		if err := l.UnmarshalText([]byte(level)); err != nil {
			return nil, fmt.Errorf("log level %q is none of debug, info, warn, error: %w", level, err)
		}
		o.Level = l
	}
	h := &handler{fields: append([]func(context.Context) []slog.Attr{Attrs, traceAttrs}, fields...), repeats: &repeats{seen: map[string]*repeated{}}}
	switch format {
	case "", "text":
		h.Handler = slog.NewTextHandler(w, o)
	case "json":
		h.Handler = slog.NewJSONHandler(w, o)
	default:
		return nil, fmt.Errorf("log format %q is none of text, json", format)
	}
	return slog.New(h), nil
}
