// Command mettle is a Bazel Remote Execution API server and its tools:
//
//	mettle dual        a complete server for one machine: storage, queue and workers
//	mettle api         one of a fleet's API servers, which take actions from clients
//	mettle worker      one of a fleet's workers, which run them
//	mettle setup       makes what a fleet needs at its broker
//	mettle operations  lists what clients wait for, and cancels
//	mettle one         runs one action here, to see what it does
//	mettle bench       measures any REAPI server
//
// This file turns the command line into options. Each subcommand is in the file
// of its name, where its parts are wired together; README.md in this folder
// follows a call through them.
package main

import (
	"io"
	"os"

	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/mettle/worker/runner/bare"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

// version is set by the linker.
var version = "dev"

type cli struct {
	flags.Common

	Dual   dualCmd       `cmd:"" help:"Serve remote execution and storage on this machine, all in one process."`
	API    apiCmd        `cmd:"" name:"api" help:"Take actions from clients, and give them to workers through a broker."`
	Worker workerCmd     `cmd:"" help:"Run actions, which API servers give through a broker."`
	Setup  setupCmd      `cmd:"" help:"Make at a broker what API servers and workers need there. It may be run again at any time."`
	Ops    operationsCmd `cmd:"" name:"operations" help:"Look at what an API server's clients wait for, and cancel operations."`
	One    oneCmd        `cmd:"" help:"Run one action here, by the digest that a failed build named."`
	Noop   noopCmd       `cmd:"" hidden:"" help:"A process of mettle bench fleet."`
	Doc    doctorCmd     `cmd:"" name:"doctor" help:"Look at a server as a client would, and say what is wrong."`
	Conf   conformCmd    `cmd:"" name:"conform" help:"Hold an REAPI server to the specification, case by case."`
	Bench  benchCmd      `cmd:"" help:"Measure an REAPI server and give each figure as a share of what the machine allows."`
}

func main() {
	// Each slot of a worker runs its commands through this same binary. What is
	// linked in costs each: of 21 MB resident a helper has 2.8 to itself, of which
	// 0.6 are by the brokers' libraries.
	if bare.IsHelper() {
		os.Exit(bare.HelperMain())
	}
	if sandbox.IsHelper() {
		os.Exit(sandbox.HelperMain())
	}
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run is main with its effects as parameters. It returns the exit status.
func run(args []string, stdout, stderr io.Writer) int {
	return program(stdout, stderr).Run(&cli{}, args)
}

func program(stdout, stderr io.Writer) flags.Program {
	return flags.Program{
		Name:        "mettle",
		Description: "Remote execution for Bazel, Please, Buck2 and everything else that speaks the Bazel Remote Execution API.",
		Env:         "METTLE",
		Version:     version,
		LogFields:   jobAttrs,
		Stdin:       os.Stdin,
		Stdout:      stdout,
		Stderr:      stderr,
	}
}
