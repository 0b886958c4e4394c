// Command elan stores blobs and action results for the Bazel Remote Execution
// API: ContentAddressableStorage, ActionCache, ByteStream and Capabilities over
// one store. It executes nothing; see mettle for that.
//
// This file turns flags into options and wires the parts; README.md in this
// folder follows a blob through them.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/alecthomas/kong"

	"github.com/mettle-build/mettle/metrics"
)

// version is set by the linker.
var version = "dev"

// cli is the command line: serving is what is done without a command.
type cli struct {
	Serve serveCmd `cmd:"" default:"withargs" help:"Serve a store to clients; what is done where no command is given."`

	LogFormat string           `name:"log_format" help:"How to log: text or json." enum:"text,json" default:"text"`
	LogLevel  string           `name:"log_level" help:"The least level that is logged: debug, info, warn or error." default:"info"`
	Version   kong.VersionFlag `help:"Print the version and exit." env:"-"`
}

func main() {
	var c cli
	kctx := kong.Parse(
		&c,
		kong.Name("elan"),
		kong.Description("Storage for the Bazel Remote Execution API: CAS, ActionCache and ByteStream."),
		kong.ShortUsageOnError(),
		kong.FlagNamer(snakeCase),
		kong.DefaultEnvars("ELAN"),
		kong.Vars{"version": version},
	)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	log, err := metrics.NewLogger(os.Stderr, c.LogFormat, c.LogLevel)
	if err == nil {
		kctx.BindTo(ctx, (*context.Context)(nil))
		kctx.BindTo(os.Stdout, (*io.Writer)(nil))
		err = kctx.Run(log)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "elan:", err)
		os.Exit(1)
	}
}

// snakeCase makes of MinFree the flag min_free. Names with initials say theirs
// in a tag.
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
