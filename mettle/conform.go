package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/mettle/conform"
	"github.com/mettle-build/mettle/mettle/platform"
)

// conformCmd holds a server, any one, to the specification.
type conformCmd struct {
	Remote   string `help:"The server, HOST:PORT, with grpcs:// before it for TLS." default:"localhost:7778" placeholder:"HOST:PORT"`
	Instance string `help:"The instance name."`
	flags.Caller
	Platform    []string      `help:"A platform property that the server wants actions to have, as key=value; several times for several." placeholder:"KEY=VALUE" sep:";"`
	NoExecution bool          `help:"Leave the cases of execution out."`
	Match       string        `help:"Run the cases whose names match this regular expression." placeholder:"REGEXP"`
	Parallel    int           `help:"How many cases run at once." default:"8"`
	Timeout     time.Duration `help:"How long a case may take." default:"1m"`
	List        bool          `help:"List the cases and run none."`
	JSON        bool          `name:"json" help:"Print a line of JSON for each case."`
	Verbose     bool          `short:"v" help:"Print each case as it ends."`
}

// Help is shown by --help.
func (c *conformCmd) Help() string {
	return "Runs the requirements of the Remote Execution API against a server, by its public API alone, each with the words that it quotes. It stores small blobs and results under digests that nobody else has, and runs /bin/sh on workers. The exit status is 1 where a MUST is not kept."
}

// Run runs the cases, or lists them.
func (c *conformCmd) Run(ctx context.Context, out io.Writer, log *slog.Logger) error {
	if c.List {
		for _, k := range conform.Cases() {
			fmt.Fprintf(out, "%s (%s)\n    %s\n", k.Name, k.Level, k.Clause)
		}
		return nil
	}
	out = flags.PlainWriter(out) // servers say what they like
	o := conform.Options{Instance: c.Instance, NoExecution: c.NoExecution, Parallel: c.Parallel, Timeout: c.Timeout}
	var err error
	if o.Platform, err = wanted(c.Platform); err != nil {
		return err
	}
	if c.Match != "" {
		if o.Match, err = regexp.Compile(c.Match); err != nil {
			return fmt.Errorf("--match: %w", err)
		}
	}
	if c.Verbose {
		o.Done = func(r conform.Result) {
			fmt.Fprintf(out, "%s  %s (%.2f s)\n", r.Outcome, r.Case.Name, r.Took.Seconds())
			for _, m := range r.Messages {
				fmt.Fprintf(out, "      %s\n", m)
			}
		}
	}
	addr, opts, err := c.Dial(c.Remote, log)
	if err != nil {
		return fmt.Errorf("--remote: %w", err)
	}
	conn, err := client.Dial(ctx, addr, opts...)
	if err != nil {
		return fmt.Errorf("%w (is a server running there? --remote names another)", err)
	}
	defer conn.Close() //nolint:errcheck // nothing is on its way
	o.Conn = conn
	results, err := conform.Run(ctx, o)
	if err != nil {
		return err
	}
	write := conform.Report
	if c.JSON {
		write = conform.WriteJSON
	}
	if err := write(out, results); err != nil {
		return err
	}
	if conform.Summarize(results).FailedMust > 0 {
		return flags.Exit(flags.ExitFailed)
	}
	return nil
}

// wanted are the properties of --platform as an action asks for them.
func wanted(values []string) ([]*repb.Platform_Property, error) {
	props := make([]*repb.Platform_Property, 0, len(values))
	for _, s := range values {
		p, err := platform.ParseProperty(s)
		if err != nil {
			return nil, fmt.Errorf("--platform: %w", err)
		}
		props = append(props, &repb.Platform_Property{Name: p.Name, Value: p.Value})
	}
	return props, nil
}
