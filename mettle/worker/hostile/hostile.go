//go:build linux

// Package hostile is a list of what an action could do to harm others, each with
// what becomes of it in each way of running: the truth of the table in the README,
// which a test of this package compares. Its tests run all of them by a real worker
// on a real store, and after each look at what the next action in the same slot
// sees, and at the host. Some are also run by the tests of whole servers.
//
// Most attacks are shell scripts. What a shell can't do is done by this program
// itself, as an input: so TestMain of each test that runs cases begins with
//
//	if hostile.IsProgram() {
//		os.Exit(hostile.ProgramMain())
//	}
//
// It holds no code of a worker, and nothing but tests calls it.
package hostile

import (
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
)

// Way is a way of running actions.
type Way int

// The ways. Plain ones are of a worker that is not root.
const (
	Sandbox      Way = iota // in namespaces, as a user of the slot's own
	PlainSandbox            // in namespaces, as the worker's user
	Bare                    // on the host, as a user of the slot's own
	PlainBare               // on the host, as the worker's user
	numWays
)

// String is the head of the way's column.
func (w Way) String() string {
	switch w {
	case Sandbox:
		return "namespaces, root"
	case PlainSandbox:
		return "namespaces"
	case Bare:
		return "bare, root"
	case PlainBare:
		return "bare"
	}
	return fmt.Sprint("way ", int(w))
}

// Verdict is what becomes of an attack.
type Verdict int

// The verdicts. Whatever it is, the next action is as the one before, except as
// Outcome.Stays has it.
const (
	// Refused: the command gets an error.
	Refused Verdict = iota + 1
	// Harmless: the command gets through with it, and nobody else notices.
	Harmless
	// Possible: the command gets through with it. Such is the way of running.
	Possible
	// AsUser: it is up to the machine, as for any program of that user.
	AsUser
	// Exits: the command ends with Outcome.Code.
	Exits
	// Fails: the action ends with the status Outcome.Code.
	Fails
	// Untried: it would harm the machine of the test. Take it as possible.
	Untried
)

// Outcome is what becomes of an attack in one way of running.
type Outcome struct {
	Verdict Verdict
	// Code is an exit code or a google.rpc.Code.
	Code int
	// Says is in the message of the response or of its status.
	Says string
	// Stays are the parts of a View that the next action sees changed.
	Stays []string
}

// Case is one attack.
type Case struct {
	// Name is unique, and says what is done.
	Name string
	// Script is for sh -e, with the variables of Host. It ends with 0 where the
	// attack got through.
	Script string
	// Attack is instead of Script: an attack of this package's program.
	Attack string
	// Command, if not nil, changes the Command in any other way.
	Command func(*repb.Command)
	// Outputs are the action's output_paths.
	Outputs []string
	// Want is what becomes of it.
	Want [numWays]Outcome
	// Check, if not nil, looks at the response in addition.
	Check func(Way, *repb.ExecuteResponse) error
	// Large cases take more than a second.
	Large bool
}

// Group is the cases of one kind.
type Group struct {
	Name  string
	Cases []Case
}

// Groups are all cases.
func Groups() []Group {
	return []Group{
		{"Reading what is not its own", reading()},
		{"Changing inputs", inputs()},
		{"Changing the host", host()},
		{"Processes", processes()},
		{"The kernel", kernel()},
		{"Network", network()},
		{"What it leaves behind", leftovers()},
		{"Its directory and its output", slot()},
		{"Outputs", outputs()},
	}
}

// Everywhere is the same outcome in each way.
func everywhere(o Outcome) [numWays]Outcome { return [numWays]Outcome{o, o, o, o} }

// each is the outcomes in the order of the ways.
func each(sandbox, plainSandbox, bare, plainBare Outcome) [numWays]Outcome {
	return [numWays]Outcome{sandbox, plainSandbox, bare, plainBare}
}

// inside is a for both ways in namespaces, and outside for the others.
func inside(a, outside Outcome) [numWays]Outcome { return each(a, a, outside, outside) }

// asRoot is a where the worker is root, and plain where it is not.
func asRoot(a, plain Outcome) [numWays]Outcome { return each(a, plain, a, plain) }

// butPlainBare is a everywhere but where nothing is between command and worker.
func butPlainBare(a, plainBare Outcome) [numWays]Outcome { return each(a, a, a, plainBare) }

func refused() Outcome  { return Outcome{Verdict: Refused} }
func harmless() Outcome { return Outcome{Verdict: Harmless} }
func possible() Outcome { return Outcome{Verdict: Possible} }
func asUser() Outcome   { return Outcome{Verdict: AsUser} }
func untried() Outcome  { return Outcome{Verdict: Untried} }

func exits(code int) Outcome { return Outcome{Verdict: Exits, Code: code} }

func fails(code int, says string) Outcome { return Outcome{Verdict: Fails, Code: code, Says: says} }

// noted is harmless, and the client is told of it.
func noted(says string) Outcome { return Outcome{Verdict: Harmless, Says: says} }

// stays is possible, and the next action sees it.
func stays(parts ...string) Outcome { return Outcome{Verdict: Possible, Stays: parts} }
