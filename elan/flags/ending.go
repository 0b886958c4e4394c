package flags

import (
	"errors"
	"time"
)

// Ending is the flag of the servers that are replaced while others serve on, for their
// commands to embed: how they end.
type Ending struct {
	ShutdownDelay time.Duration `help:"How long to go on as before after SIGTERM, but for /readyz and the health service, which say no. For balancers that send clients for a while yet." default:"0s"`
}

// Check is for the commands' Validate.
func (e Ending) Check() error {
	if e.ShutdownDelay < 0 {
		return errors.New("--shutdown_delay: negative; 0 ends at once")
	}
	return nil
}
