// Package runner is the contract for running one command: what it gets, and
// what is known of it afterwards. The ways of running are in the folders beside
// this file: bare and sandbox, by one helper, and one suite for both.
package runner

import (
	"context"
	"errors"
	"time"
)

// Spec is one command to run. All paths are absolute.
type Spec struct {
	// Args is the command line. Args[0] without a slash is looked up in the
	// PATH of Env, with a slash it is relative to Dir.
	Args []string
	// Env is the whole environment, as KEY=value.
	Env []string
	// Root is the action's own directory, which holds Dir. A runner may show it
	// to the command at another path.
	Root string
	// Dir is the working directory.
	Dir string
	// Stdout and Stderr are the files that the output goes to. The runner
	// creates them, or takes empty ones that it created before; stdin is
	// empty.
	Stdout, Stderr string
	// MaxOutputBytes bounds Stdout and Stderr, each. A command that writes
	// more is killed, and Run's error wraps ErrOutputTooLarge beside a valid
	// Result. 0 is no bound.
	MaxOutputBytes int64
}

// Result is what is known of a command that was started.
type Result struct {
	// ExitCode is the exit status; 128 plus the signal's number where a signal
	// ended it; 127 where the program was not found and 126 where it could not
	// be executed, with the reason in Stderr, as in a shell.
	ExitCode int
	// Start and End bound the command itself.
	Start, End time.Time
	// StdoutBytes and StderrBytes are the sizes of the files.
	StdoutBytes, StderrBytes int64
	Usage                    Usage
}

// Usage is what the command and those of its descendants that it waited for
// have used.
type Usage struct {
	UserTime, SystemTime              time.Duration
	MaxRSSBytes                       int64
	MinorFaults, MajorFaults          int64
	BlockInputs, BlockOutputs         int64
	VoluntarySwitches, ForcedSwitches int64
}

// ErrOutputTooLarge: the command wrote more to stdout or stderr than it may.
var ErrOutputTooLarge = errors.New("the command printed too much")

// A Runner runs commands, one at a time: each slot of a worker has its own.
type Runner interface {
	// Run runs the command until it ends. When Run returns, no process that it
	// started is alive, whatever it did to escape. When ctx is done before the
	// command, the command is killed with all its descendants, and the error
	// wraps ctx's cause beside a valid Result. Any other error means that the
	// runner itself failed, not the command.
	Run(ctx context.Context, spec Spec) (Result, error)
	// Close frees the runner. Nothing runs any more when it returns.
	Close() error
}
