// Package runner is the contract for running one command: what it gets, and
// what is known of it afterwards. The ways of running are in the folders beside
// this file: bare and sandbox, by one helper, and one suite for both.
package runner

import (
	"context"
	"errors"
	"os"
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

// Limits bound what one command may use, with all its processes. Where this machine
// can't hold it to one of them, a runner is not made, or says so: see its Options.
// The zero Limits bound nothing.
type Limits struct {
	// MemoryBytes is how much memory; a command that needs more is killed, and
	// Run's error wraps ErrOutOfMemory.
	MemoryBytes int64
	// CPUs is how many processors' time, as in 1.5.
	CPUs float64
	// Processes is how many processes and threads at once: no more can be started.
	Processes int
	// DiskBytes is how much may be written to Spec.Root and to directories for
	// temporary files; a command that writes more is killed, and Run's error wraps
	// ErrDiskQuota.
	DiskBytes int64
}

// Streams are where a command reads its requests and writes its answers, one that
// runs for long. A runner that is made with them runs one command, whose Spec has
// no Stdout, no Stderr and no MaxOutputBytes. They are ends of pipes; who made them
// closes them as soon as the runner is made, and keeps the other ends.
type Streams struct {
	Stdin, Stdout, Stderr *os.File
}

// ErrUsed: a runner with Streams was to run another command.
var ErrUsed = errors.New("the runner has run the one command that its streams are for")

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
	// Notes are what a person should know of a command that ran into a limit and
	// was not ended for it, a sentence each.
	Notes []string
}

// Usage is what the command and those of its descendants that it waited for
// have used.
type Usage struct {
	UserTime, SystemTime time.Duration
	MaxRSSBytes          int64
	// PeakMemoryBytes is the most that all processes of the command had at one
	// time. 0: it was not measured.
	PeakMemoryBytes                   int64
	MinorFaults, MajorFaults          int64
	BlockInputs, BlockOutputs         int64
	VoluntarySwitches, ForcedSwitches int64
}

// Why a runner ends a command. Each comes with a valid Result.
var (
	// ErrOutputTooLarge: the command wrote more to stdout or stderr than it may.
	ErrOutputTooLarge = errors.New("the command printed too much")
	// ErrOutOfMemory: the command, or a process of it, was killed for want of
	// memory below its limit.
	ErrOutOfMemory = errors.New("the command ran out of memory")
	// ErrDiskQuota: the command wrote more to the disk than it may.
	ErrDiskQuota = errors.New("the command wrote too much to the disk")
)

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
