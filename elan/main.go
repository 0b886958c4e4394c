// Command elan stores blobs and action results for the Bazel Remote Execution
// API: ContentAddressableStorage, ActionCache, ByteStream and Capabilities over
// one store. It executes nothing; see mettle for that.
//
//	elan [serve]                      serves a store
//	elan ls|stat|get|put|rm|du|verify works on a store, a server's or one by its URL
//
// This file has the commands; each is in the file of its name, which turns flags
// into options and wires the parts. README.md in this folder follows a blob
// through them. The exit status is 0, 1 where something failed or was not there,
// and 2 where the command line makes no sense.
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

	Serve  serveCmd  `cmd:"" default:"withargs" help:"Serve a store to clients; what is done where no command is given."`
	Ls     lsCmd     `cmd:"" help:"List what is in a store."`
	Stat   statCmd   `cmd:"" help:"Tell whether blobs are there, how they are stored, and what they mean."`
	Get    getCmd    `cmd:"" help:"Fetch a blob, or a tree of files."`
	Put    putCmd    `cmd:"" help:"Put files and directories in, and print their digests."`
	Rm     rmCmd     `cmd:"" help:"Remove blobs, or entries of the ActionCache, before their time."`
	Du     duCmd     `cmd:"" help:"Add up what is in a store, by digest function, size and last use."`
	Verify verifyCmd `cmd:"" help:"Compare blobs with their digests."`
}

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// run is main with its effects as parameters. It returns the exit status.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	return program(stdin, stdout, stderr).Run(&cli{}, args)
}

func program(stdin io.Reader, stdout, stderr io.Writer) flags.Program {
	return flags.Program{
		Name:        "elan",
		Description: "Storage for the Bazel Remote Execution API: CAS, ActionCache and ByteStream.",
		Env:         "ELAN",
		Version:     version,
		Vars:        map[string]string{"default_remote": defaultRemote},
		Stdin:       stdin,
		Stdout:      stdout,
		Stderr:      stderr,
	}
}
