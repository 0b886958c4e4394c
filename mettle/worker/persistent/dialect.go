//go:build linux

package persistent

import (
	"fmt"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
)

// Protocol is how messages are written.
type Protocol string

// The protocols.
const (
	Proto Protocol = "proto"
	JSON  Protocol = "json"
)

// Platform properties by which clients mark actions. Bazel sets the first one with
// --experimental_remote_mark_tool_inputs, and later versions the second; the others
// come from exec_properties of toolchains and rules.
const (
	keyProperty       = "persistentWorkerKey"
	protocolProperty  = "persistentWorkerProtocol"
	requiresProperty  = "requires-worker-protocol"
	supportsProperty  = "supports-workers"
	supportsProperty2 = "persistent-workers"
)

// toolInput is the node property by which clients mark the files of a tool.
const toolInput = "bazel_tool_input"

// persistentFlag tells a tool to serve requests.
const persistentFlag = "--persistent_worker"

// Tool is what an action that is marked is split into.
type Tool struct {
	// Key is what the client calls the tool. It may be empty.
	Key      string
	Protocol Protocol
	// Startup is the command line of the process.
	Startup []string
	// FlagFiles are the arguments that are the action's own.
	FlagFiles []string
}

// Of is the tool of an action whose platform marks it as one for a persistent
// worker, and nil for others. Where a marked action can't have one, the error wraps
// ErrPlain.
func Of(platform *repb.Platform, c *repb.Command) (*Tool, error) {
	t := &Tool{}
	marked, protocol, required := false, "", ""
	for _, p := range platform.GetProperties() {
		switch p.GetName() {
		case keyProperty:
			t.Key = p.GetValue()
			marked = marked || t.Key != ""
		case supportsProperty, supportsProperty2:
			marked = marked || p.GetValue() == "1" || strings.EqualFold(p.GetValue(), "true")
		case protocolProperty:
			protocol = p.GetValue()
		case requiresProperty:
			required = p.GetValue()
		}
	}
	if !marked {
		return nil, nil //nolint:nilnil // said above
	}
	if protocol == "" {
		protocol = required
	}
	switch protocol {
	case "", string(Proto):
		t.Protocol = Proto
	case string(JSON):
		t.Protocol = JSON
	default:
		return nil, fmt.Errorf("%w: the action asks for the worker protocol %.40q, and known are %q and %q", ErrPlain, protocol, Proto, JSON)
	}
	t.split(c.GetArguments())
	switch {
	case len(t.FlagFiles) == 0:
		return nil, fmt.Errorf("%w: the action has no argument @FILE or --flagfile=FILE, so there is nothing to ask for", ErrPlain)
	case len(t.Startup) == 1:
		return nil, fmt.Errorf("%w: the action has no arguments but flag files", ErrPlain)
	}
	return t, nil
}

// split does as Bazel does with --noworker_strict_flagfiles.
func (t *Tool) split(args []string) {
	for _, a := range args {
		if isFlagFile(a) {
			t.FlagFiles = append(t.FlagFiles, a)
		} else {
			t.Startup = append(t.Startup, a)
		}
	}
	t.Startup = append(t.Startup, persistentFlag)
}

func isFlagFile(arg string) bool {
	for _, prefix := range []string{"@", "-flagfile=", "--flagfile="} {
		if rest, ok := strings.CutPrefix(arg, prefix); ok && rest != "" {
			return true
		}
	}
	return false
}
