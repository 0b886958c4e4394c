// Package command says which Commands can be run at all: what remote_execution.proto
// demands of their arguments, environment, working directory and output paths,
// and the limits of a POSIX system beneath it. It works on the message alone and
// touches no file; platform properties are package platform's. The API checks a
// Command with it before anything is queued, and a worker again before it runs
// one, because a worker doesn't trust its queue.
package command

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"unicode/utf8"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
)

// ErrInvalid is wrapped by all errors of this package: the fault is in the
// Command that somebody sent.
var ErrInvalid = errors.New("invalid command")

// Limits of Linux (limits.h): a longer name or path can't exist there.
const (
	maxNameBytes = 255
	maxPathBytes = 4095
	// maxOutputs bounds the work that one Command makes by itself.
	maxOutputs = 100_000
)

// The output_node_properties that are known.
const (
	PropertyMtime    = "mtime"
	PropertyUnixMode = "unix_mode"
)

// Validate checks c. What the spec wants sorted may come unsorted: some clients
// send it so, and it harms nobody but them. The errors wrap ErrInvalid and name
// the offending field and what would be right.
func Validate(c *repb.Command) error {
	if c == nil {
		return fmt.Errorf("%w: the command is absent", ErrInvalid)
	}
	if err := validateArguments(c.Arguments); err != nil {
		return err
	}
	for i, v := range c.EnvironmentVariables {
		switch {
		case v.GetName() == "":
			return fmt.Errorf("%w: environment_variables[%d] has no name", ErrInvalid, i)
		case strings.ContainsAny(v.Name, "=\x00"):
			return fmt.Errorf("%w: environment_variables[%d]: the name %.200q contains '=' or NUL", ErrInvalid, i, v.Name)
		case strings.IndexByte(v.Value, 0) >= 0:
			return fmt.Errorf("%w: environment_variables[%d]: the value of %.200q contains NUL", ErrInvalid, i, v.Name)
		}
	}
	if err := validateWorkingDirectory(c.WorkingDirectory); err != nil {
		return err
	}
	for i, p := range c.OutputNodeProperties {
		if p != PropertyMtime && p != PropertyUnixMode {
			return fmt.Errorf("%w: output_node_properties[%d]: %.200q is not known here, use %s or %s", ErrInvalid, i, p, PropertyMtime, PropertyUnixMode)
		}
	}
	return validateOutputs(c)
}

func validateArguments(args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("%w: arguments is empty, the first one names the program", ErrInvalid)
	}
	if args[0] == "" {
		return fmt.Errorf("%w: arguments[0] is empty, it names the program", ErrInvalid)
	}
	for i, a := range args {
		if strings.IndexByte(a, 0) >= 0 {
			return fmt.Errorf("%w: arguments[%d] contains NUL", ErrInvalid, i)
		}
	}
	return nil
}

func validateWorkingDirectory(dir string) error {
	bad := func(why string) error {
		return fmt.Errorf("%w: working_directory %.200q %s, want a path below the input root", ErrInvalid, dir, why)
	}
	switch {
	case dir == "":
		return nil
	case dir[0] == '/':
		return bad("is absolute")
	case len(dir) > maxPathBytes:
		return bad("is too long")
	}
	for name := range strings.SplitSeq(dir, "/") {
		if name == ".." {
			return bad(`contains ".."`)
		}
		if why := badName(name); why != "" {
			return bad(why)
		}
	}
	return nil
}

// badName says what keeps name from being a part of a path, if anything.
func badName(name string) string {
	switch {
	case len(name) > maxNameBytes:
		return fmt.Sprintf("has a part of over %d bytes", maxNameBytes)
	case strings.IndexByte(name, 0) >= 0:
		return "contains NUL"
	case !utf8.ValidString(name):
		return "is not UTF-8"
	}
	return ""
}

// WorkingDirectory is the working directory of a valid c in its shortest form,
// relative to the input root; "" is the input root.
func WorkingDirectory(c *repb.Command) string {
	if c.WorkingDirectory == "" {
		return ""
	}
	if d := path.Clean(c.WorkingDirectory); d != "." {
		return d
	}
	return ""
}

// OutputPath is the place of an output path of a valid c, relative to the input
// root; "" is the input root.
func OutputPath(c *repb.Command, output string) string {
	if p := path.Join(WorkingDirectory(c), output); p != "." {
		return p
	}
	return ""
}

// Outputs lists what a valid c says of its outputs, by the newer field where it
// is used and by the two older ones where it is not.
func Outputs(c *repb.Command) (paths, files, directories []string) {
	if len(c.OutputPaths) > 0 {
		return c.OutputPaths, nil, nil
	}
	return nil, c.OutputFiles, c.OutputDirectories
}

func validateOutputs(c *repb.Command) error {
	paths, files, directories := Outputs(c)
	if n := len(paths) + len(files) + len(directories); n > maxOutputs {
		return fmt.Errorf("%w: %d outputs, at most %d can be taken", ErrInvalid, n, maxOutputs)
	}
	wd := WorkingDirectory(c)
	for _, l := range []struct {
		field string
		paths []string
	}{{"output_paths", paths}, {"output_files", files}, {"output_directories", directories}} {
		for i, p := range l.paths {
			if p == "" && l.field != "output_files" {
				continue // the whole working directory
			}
			if why := badOutput(wd, p); why != "" {
				return fmt.Errorf("%w: %s[%d]: %.200q %s, want a path relative to the working directory and below the input root", ErrInvalid, l.field, i, p, why)
			}
		}
		if p, ok := duplicate(l.paths); ok {
			return fmt.Errorf("%w: %s has %.200q twice", ErrInvalid, l.field, p)
		}
	}
	return validateOverlap(files, directories)
}

// badOutput says what is wrong with the output path p, if anything. Leading
// ".." are fine as long as they stay within the input root: recc names outputs
// beside its working directory so. Elsewhere ".." means different things before
// and after symlinks are made, and is refused.
func badOutput(wd, p string) string {
	switch {
	case p == "":
		return "is empty"
	case p[0] == '/':
		return "is absolute"
	case p[len(p)-1] == '/':
		return "ends in '/'"
	case len(p) > maxPathBytes:
		return "is too long"
	}
	up := 0
	if wd != "" {
		up = 1 + strings.Count(wd, "/")
	}
	leading := true
	for name := range strings.SplitSeq(p, "/") {
		switch name {
		case "", ".":
			return fmt.Sprintf("has a part %q", name)
		case "..":
			if !leading {
				return `has ".." after a name`
			}
			if up--; up < 0 {
				return "leads out of the input root"
			}
			continue
		}
		leading = false
		if why := badName(name); why != "" {
			return why
		}
	}
	if leading {
		return "names no output"
	}
	return ""
}

func duplicate(paths []string) (string, bool) {
	if isStrictlySorted(paths) { // as the spec has it, and almost all clients
		return "", false
	}
	s := slices.Sorted(slices.Values(paths))
	for i := 1; i < len(s); i++ {
		if s[i] == s[i-1] {
			return s[i], true
		}
	}
	return "", false
}

func isStrictlySorted(s []string) bool {
	for i := 1; i < len(s); i++ {
		if s[i] <= s[i-1] {
			return false
		}
	}
	return true
}

// validateOverlap checks that no output file is also an output directory, nor a
// parent of another output.
func validateOverlap(files, directories []string) error {
	if len(files) == 0 || len(files)+len(directories) < 2 {
		return nil
	}
	isFile := make(map[string]struct{}, len(files))
	for _, f := range files {
		isFile[f] = struct{}{}
	}
	for _, d := range directories {
		if _, ok := isFile[d]; ok {
			return fmt.Errorf("%w: %.200q is in output_files and in output_directories", ErrInvalid, d)
		}
	}
	for _, l := range [][]string{files, directories} {
		for _, p := range l {
			for i := strings.LastIndexByte(p, '/'); i > 0; i = strings.LastIndexByte(p[:i], '/') {
				if _, ok := isFile[p[:i]]; ok {
					return fmt.Errorf("%w: output_files has %.200q, which is a parent of the output %.200q", ErrInvalid, p[:i], p)
				}
			}
		}
	}
	return nil
}
