package api

import (
	"log/slog"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// ended counts and logs how a call has ended.
func (s *Server) ended(c *call, err error, start time.Time) {
	s.logEnd(c, s.metrics.ended(c.stream.Context(), c, err, start), err, time.Since(start))
}

// logEnd writes a line for each call: at info where an operator may have to do
// something about it, because nothing ran or our side failed, and else for
// debugging, as there are thousands a second.
func (s *Server) logEnd(c *call, o outcome, err error, took time.Duration) {
	level, message := slog.LevelDebug, "execute ended"
	switch o {
	case outcomeNone:
		return
	// Each has a message of its own, since what is repeated is left out by message.
	case outcomeRefused:
		level, message = slog.LevelInfo, "an action was refused"
	case outcomeFailed:
		level, message = slog.LevelInfo, "an action could not be run to its end"
	case outcomeUnavailable:
		if !s.isDraining() { // streams are cut then, and resumed elsewhere
			level, message = slog.LevelInfo, "an action was not run by a fault of the servers"
		}
	}
	ctx := c.stream.Context()
	if !s.log.Enabled(ctx, level) {
		return
	}
	attrs := append(make([]slog.Attr, 0, 8), slog.String("outcome", o.String()), slog.Duration("duration", took))
	if c.text != "" {
		attrs = append(attrs, slog.String("operation", c.text), slog.String("digest", c.name.Action.String()), slog.String("instance", c.name.Instance))
	}
	switch said := &(repb.ExecuteResponse{}); {
	case err != nil:
		attrs = append(attrs, slog.String("code", status.Code(err).String()), slog.String("error", status.Convert(err).Message()))
	case c.response != nil && (o == outcomeFailed || o == outcomeRefused) && proto.Unmarshal(c.response, said) == nil:
		end := status.FromProto(said.GetStatus())
		attrs = append(attrs, slog.String("code", end.Code().String()), slog.String("error", end.Message()))
	}
	s.log.LogAttrs(ctx, level, message, attrs...) //nolint:sloglint // one of the constants above
}
