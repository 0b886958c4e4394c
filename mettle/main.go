// Command mettle is a Bazel Remote Execution API server and its tools:
//
//	mettle dual     a complete server for one machine: storage, queue and workers
//	mettle one      runs one action here, to see what it does
//	mettle bench    measures any REAPI server
//
// This file turns the command line into options. Each subcommand is in the file
// of its name, where its parts are wired together; README.md in this folder
// follows a call through them.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/alecthomas/kong"

	"github.com/mettle-build/mettle/metrics"
	"github.com/mettle-build/mettle/mettle/worker/runner/bare"
)

// version is set by the linker.
var version = "dev"

type cli struct {
	Dual  dualCmd  `cmd:"" help:"Serve remote execution and storage on this machine, all in one process."`
	One   oneCmd   `cmd:"" help:"Run one action here, by the digest that a failed build named."`
	Bench benchCmd `cmd:"" help:"Measure an REAPI server and give each figure as a share of what the machine allows."`

	LogFormat string           `help:"How to log: text or json." enum:"text,json" default:"text"`
	LogLevel  string           `help:"The least level that is logged: debug, info, warn or error." default:"info"`
	Version   kong.VersionFlag `help:"Print the version and exit." env:"-"`
}

func main() {
	// Each slot of a worker runs its commands through this same binary.
	if bare.IsHelper() {
		os.Exit(bare.HelperMain())
	}
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run is main with its effects as parameters. It returns the exit status.
func run(args []string, stdout, stderr io.Writer) int {
	var c cli
	parser, err := kong.New(&c,
		kong.Name("mettle"),
		kong.Description("Remote execution for Bazel, Please, Buck2 and everything else that speaks the Bazel Remote Execution API."),
		kong.ShortUsageOnError(),
		kong.FlagNamer(snakeCase),
		kong.DefaultEnvars("METTLE"),
		kong.Vars{"version": version},
		kong.Writers(stdout, stderr),
	)
	if err != nil {
		fmt.Fprintln(stderr, "mettle:", err)
		return 2
	}
	kctx, err := parser.Parse(args)
	if err != nil {
		parser.FatalIfErrorf(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	log, err := metrics.NewLogger(stderr, c.LogFormat, c.LogLevel)
	if err != nil {
		fmt.Fprintln(stderr, "mettle:", err)
		return 2
	}
	kctx.BindTo(ctx, (*context.Context)(nil))
	kctx.BindTo(stdout, (*io.Writer)(nil))
	kctx.Bind(log)
	var exit exitError
	switch err := kctx.Run(); {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return int(exit)
	default:
		fmt.Fprintln(stderr, "mettle:", err)
		return 1
	}
}

// exitError is the exit status of a command that was run for the user, and has
// said for itself what went wrong.
type exitError int

// Error implements error.
func (e exitError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// snakeCase makes of MinFree the flag min_free, as with Bazel and Please. Names
// with initials say theirs in a tag.
func snakeCase(field string) string {
	var b strings.Builder
	for i, r := range field {
		if i > 0 && r >= 'A' && r <= 'Z' {
			b.WriteByte('_')
		}
		b.WriteRune(r)
	}
	return strings.ToLower(b.String())
}
