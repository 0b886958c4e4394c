// Command elan stores blobs and action results for the Bazel Remote Execution
// API: ContentAddressableStorage, ActionCache, ByteStream and Capabilities over
// one store. It executes nothing; see mettle for that.
//
// This file turns flags into options and wires the parts; README.md in this
// folder follows a blob through them.
package main

import (
	"io"
	"os"

	"github.com/mettle-build/mettle/elan/flags"
)

// version is set by the linker.
var version = "dev"

// cli is the command line: serving is what is done without a command.
type cli struct {
	flags.Common

	Serve serveCmd `cmd:"" default:"withargs" help:"Serve a store to clients; what is done where no command is given."`
}

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// run is main with its effects as parameters. It returns the exit status.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	return flags.Program{
		Name:        "elan",
		Description: "Storage for the Bazel Remote Execution API: CAS, ActionCache and ByteStream.",
		Env:         "ELAN",
		Version:     version,
		Stdin:       stdin,
		Stdout:      stdout,
		Stderr:      stderr,
	}.Run(&cli{}, args)
}
