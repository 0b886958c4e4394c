package command_test

import (
	"errors"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/mettle/command"
)

func TestValidate(t *testing.T) {
	type env = repb.Command_EnvironmentVariable
	args := []string{"true"}
	for _, tc := range []struct {
		name string
		cmd  *repb.Command
		want string // a part of the error; "" is valid
	}{
		{"absent", nil, "absent"},
		{"no arguments", &repb.Command{}, "arguments is empty"},
		{"empty program", &repb.Command{Arguments: []string{"", "x"}}, "arguments[0]"},
		{"NUL in argument", &repb.Command{Arguments: []string{"a", "b\x00"}}, "arguments[1]"},
		{"minimal", &repb.Command{Arguments: args}, ""},
		{"empty argument", &repb.Command{Arguments: []string{"a", ""}}, ""},
		{"env unsorted", &repb.Command{Arguments: args, EnvironmentVariables: []*env{{Name: "B"}, {Name: "A"}}}, ""},
		{"env unnamed", &repb.Command{Arguments: args, EnvironmentVariables: []*env{{Value: "x"}}}, "environment_variables[0] has no name"},
		{"env nil", &repb.Command{Arguments: args, EnvironmentVariables: []*env{nil}}, "environment_variables[0] has no name"},
		{"env equals sign", &repb.Command{Arguments: args, EnvironmentVariables: []*env{{Name: "A=B"}}}, "contains '='"},
		{"env NUL in value", &repb.Command{Arguments: args, EnvironmentVariables: []*env{{Name: "A", Value: "\x00"}}}, "contains NUL"},
		{"env value with equals sign", &repb.Command{Arguments: args, EnvironmentVariables: []*env{{Name: "A", Value: "b=c"}}}, ""},
		{"wd", &repb.Command{Arguments: args, WorkingDirectory: "a/b"}, ""},
		{"wd with slash at the end", &repb.Command{Arguments: args, WorkingDirectory: "a/b/"}, ""},
		{"wd dot", &repb.Command{Arguments: args, WorkingDirectory: "."}, ""},
		{"wd absolute", &repb.Command{Arguments: args, WorkingDirectory: "/a"}, "is absolute"},
		{"wd escapes", &repb.Command{Arguments: args, WorkingDirectory: "a/../../b"}, `contains ".."`},
		{"wd inner dotdot", &repb.Command{Arguments: args, WorkingDirectory: "a/../b"}, `contains ".."`},
		{"wd NUL", &repb.Command{Arguments: args, WorkingDirectory: "a\x00"}, "contains NUL"},
		{"wd long name", &repb.Command{Arguments: args, WorkingDirectory: strings.Repeat("a", 256)}, "over 255 bytes"},
		{"path", &repb.Command{Arguments: args, OutputPaths: []string{"a/b", "c"}}, ""},
		{"path unsorted", &repb.Command{Arguments: args, OutputPaths: []string{"c", "a/b"}}, ""},
		{"path in a path", &repb.Command{Arguments: args, OutputPaths: []string{"a", "a/b"}}, ""},
		{"path empty", &repb.Command{Arguments: args, OutputPaths: []string{""}}, ""},
		{"path absolute", &repb.Command{Arguments: args, OutputPaths: []string{"/etc/passwd"}}, "is absolute"},
		{"path escapes", &repb.Command{Arguments: args, OutputPaths: []string{"../x"}}, "leads out of the input root"},
		{"path escapes wd and root", &repb.Command{Arguments: args, WorkingDirectory: "w", OutputPaths: []string{"../../x"}}, "leads out of the input root"},
		{"path beside wd", &repb.Command{Arguments: args, WorkingDirectory: "w", OutputPaths: []string{"../x"}}, ""},
		{"path is above wd", &repb.Command{Arguments: args, WorkingDirectory: "w", OutputPaths: []string{".."}}, "names no output"},
		{"path inner dotdot", &repb.Command{Arguments: args, OutputPaths: []string{"a/../b"}}, "after a name"},
		{"path dot", &repb.Command{Arguments: args, OutputPaths: []string{"./a"}}, `a part "."`},
		{"path double slash", &repb.Command{Arguments: args, OutputPaths: []string{"a//b"}}, `a part ""`},
		{"path slash at the end", &repb.Command{Arguments: args, OutputPaths: []string{"a/"}}, "ends in '/'"},
		{"path NUL", &repb.Command{Arguments: args, OutputPaths: []string{"a\x00b"}}, "contains NUL"},
		{"path not UTF-8", &repb.Command{Arguments: args, OutputPaths: []string{"a\xff"}}, "not UTF-8"},
		{"path too long", &repb.Command{Arguments: args, OutputPaths: []string{strings.Repeat("a/", 2100) + "a"}}, "too long"},
		{"path twice", &repb.Command{Arguments: args, OutputPaths: []string{"b", "a", "b"}}, `"b" twice`},
		{"old fields ignored", &repb.Command{Arguments: args, OutputPaths: []string{"a"}, OutputFiles: []string{"/x"}}, ""},
		{"file empty", &repb.Command{Arguments: args, OutputFiles: []string{""}}, "is empty"},
		{"file twice", &repb.Command{Arguments: args, OutputFiles: []string{"a", "a"}}, "twice"},
		{"file above file", &repb.Command{Arguments: args, OutputFiles: []string{"a", "a/b"}}, "is a parent"},
		{"file above directory", &repb.Command{Arguments: args, OutputFiles: []string{"a"}, OutputDirectories: []string{"a/b/c"}}, "is a parent"},
		{"directory above file", &repb.Command{Arguments: args, OutputFiles: []string{"a/b"}, OutputDirectories: []string{"a"}}, ""},
		{"directory above directory", &repb.Command{Arguments: args, OutputDirectories: []string{"", "a", "a/b"}}, ""},
		{"file and directory", &repb.Command{Arguments: args, OutputFiles: []string{"a"}, OutputDirectories: []string{"a"}}, "in output_directories"},
		{"directory escapes", &repb.Command{Arguments: args, OutputDirectories: []string{"../../x"}}, "leads out"},
		{"known properties", &repb.Command{Arguments: args, OutputNodeProperties: []string{"mtime", "unix_mode"}}, ""},
		{"unknown property", &repb.Command{Arguments: args, OutputNodeProperties: []string{"colour"}}, "is not known"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := command.Validate(tc.cmd)
			switch {
			case tc.want == "" && err != nil:
				t.Errorf("Validate: %v, want it to be valid", err)
			case tc.want != "" && !errors.Is(err, command.ErrInvalid):
				t.Errorf("Validate: %v, want an ErrInvalid about %q", err, tc.want)
			case tc.want != "" && !strings.Contains(err.Error(), tc.want):
				t.Errorf("Validate: %v, want it to say %q", err, tc.want)
			}
		})
	}
}

func TestOutputPath(t *testing.T) {
	for _, tc := range []struct{ wd, output, wantDir, want string }{
		{"", "a/b", "", "a/b"},
		{"", "", "", ""},
		{".", "x", "", "x"},
		{"w/", "x", "w", "w/x"},
		{"w/v", "../x", "w/v", "w/x"},
		{"w/v", "", "w/v", "w/v"},
	} {
		c := &repb.Command{WorkingDirectory: tc.wd}
		if got := command.WorkingDirectory(c); got != tc.wantDir {
			t.Errorf("WorkingDirectory of %q = %q, want %q", tc.wd, got, tc.wantDir)
		}
		if got := command.OutputPath(c, tc.output); got != tc.want {
			t.Errorf("OutputPath of %q in %q = %q, want %q", tc.output, tc.wd, got, tc.want)
		}
	}
}

// FuzzValidate holds that what is valid stays within the input root.
func FuzzValidate(f *testing.F) {
	f.Add("w", "../x")
	f.Add("", "a/../../b")
	f.Add("a//b/.", "../../..//x")
	f.Fuzz(func(t *testing.T, wd, output string) {
		c := &repb.Command{Arguments: []string{"x"}, WorkingDirectory: wd, OutputPaths: []string{output}}
		if command.Validate(c) != nil {
			return
		}
		for _, p := range []string{command.WorkingDirectory(c), command.OutputPath(c, output)} {
			if p == ".." || strings.HasPrefix(p, "../") || strings.HasPrefix(p, "/") || strings.IndexByte(p, 0) >= 0 {
				t.Errorf("working directory %q and output %q lead to %q", wd, output, p)
			}
		}
	})
}
