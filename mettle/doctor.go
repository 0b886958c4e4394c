package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"

	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/mettle/doctor"
)

// doctorCmd looks at an endpoint as a client would.
type doctorCmd struct {
	Remote   string `help:"The server, HOST:PORT, with grpcs:// before it for TLS." default:"localhost:7778" placeholder:"HOST:PORT"`
	Instance string `help:"The instance name that builds use."`
	flags.Caller
	Platform    []string `help:"A platform property of the action that is tried, as key=value; several times for several." placeholder:"KEY=VALUE" sep:";"`
	NoExecution bool     `help:"Try no action: the server is a cache."`
}

// Help is shown by --help.
func (c *doctorCmd) Help() string {
	return "Prints a line for each thing that a build needs of the server, and under what is wrong what to do. The exit status is 1 where builds would fail."
}

// Run looks, and prints what it finds.
func (c *doctorCmd) Run(ctx context.Context, out io.Writer, log *slog.Logger) error {
	o := doctor.Options{Instance: c.Instance, NoExecution: c.NoExecution}
	var err error
	if o.Platform, err = wanted(c.Platform); err != nil {
		return err
	}
	addr, opts, err := c.Dial(c.Remote, log)
	if err != nil {
		return fmt.Errorf("--remote: %w", err)
	}
	targets, err := client.ParseTargets(addr)
	if err != nil {
		return fmt.Errorf("--remote: %w", err)
	}
	// Not client.Dial, so that the first call says what is wrong with the connection.
	conn, err := client.Connect(targets, opts...)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // nothing is on its way
	if o.Store, err = client.New(client.Options{Conn: conn, Instance: c.Instance}); err != nil {
		return err
	}
	o.Conn = conn
	if !c.Encrypted(c.Remote) {
		o.SpeaksTLS = func(ctx context.Context) bool {
			return slices.ContainsFunc(targets, func(t string) bool { return client.SpeaksTLS(ctx, t) })
		}
	}
	o.Found = func(f doctor.Finding) {
		found := strings.ReplaceAll(flags.Plain(f.Found), "\n", "\n                             ") // no line of the server's looks like one of ours
		fmt.Fprintf(out, "%-4s  %-22s %s\n", f.Outcome, f.What, found)
		if f.Advice != "" {
			fmt.Fprintf(out, "      %-22s → %s\n", "", f.Advice)
		}
	}
	if doctor.Worst(doctor.Examine(ctx, o)) == doctor.Failure {
		return flags.Exit(flags.ExitFailed)
	}
	return nil
}
