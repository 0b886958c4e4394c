package flags

import (
	"errors"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/gate"
)

// Connections are the flags of the commands that serve clients, for them to embed:
// how much of the server its clients may take up. See package gate.
type Connections struct {
	MaxConnections           int           `help:"How many connections clients may have open, all together. 0: three quarters of the files that the process may open, at most 65536." default:"0"`
	MaxConnectionsPerAddress int           `help:"How many of them may come from one address; a proxy or a gateway is one too. 0: half of all." default:"0"`
	MaxConnectionIdle        time.Duration `help:"How long a connection stays open that has no call." default:"4h"`
	MaxConnectionAge         time.Duration `help:"How long a connection takes new calls, more or less a tenth; clients make a new one then, which a balancer may send to another server. 0: for ever." default:"0"`
	MaxConnectionAgeGrace    time.Duration `help:"How long calls may still take on a connection of that age, before they are cut off; an execution that is cut off is resumed by its client." default:"24h"`
	StallTimeout             time.Duration `help:"How long a call may wait for its client to send something, or to take something, before it ends with DEADLINE_EXCEEDED." default:"5m"`
	MaxMemory                Size          `name:"max_memory" help:"How much memory may be in use on the heap before calls are turned away and ended, of the client that has the most of them. 0: three quarters of what the machine, or the control group, has, or GOMEMLIMIT where that is less." default:"0"`
}

// Check is for the commands' Validate.
func (c Connections) Check() error {
	switch {
	case c.MaxConnections < 0 || c.MaxConnectionsPerAddress < 0:
		return errors.New("--max_connections, --max_connections_per_address: a negative number")
	case c.MaxConnectionIdle <= 0 || c.MaxConnectionAgeGrace <= 0 || c.StallTimeout <= 0:
		return errors.New("--max_connection_idle, --max_connection_age_grace, --stall_timeout: not above 0")
	case c.MaxConnectionAge < 0:
		return errors.New("--max_connection_age: negative; 0 is for ever")
	}
	return nil
}

// Gate is what the flags come to, in front of guard. The prefix begins the metrics'
// names.
func (c Connections) Gate(prefix string, guard *Guarded, log *slog.Logger, r prometheus.Registerer) (*gate.Gate, error) {
	return gate.New(gate.Options{
		Prefix:                   prefix,
		MaxConnections:           c.MaxConnections,
		MaxConnectionsPerAddress: c.MaxConnectionsPerAddress,
		MaxIdle:                  c.MaxConnectionIdle,
		MaxAge:                   c.MaxConnectionAge,
		AgeGrace:                 c.MaxConnectionAgeGrace,
		Stall:                    c.StallTimeout,
		MaxMemoryBytes:           int64(c.MaxMemory),
		Admit:                    guard.admit(),
		Logger:                   log,
		Registerer:               r,
	})
}
