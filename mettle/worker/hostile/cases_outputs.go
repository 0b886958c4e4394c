//go:build linux

package hostile

import (
	"fmt"
	"slices"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
)

func outputs() []Case {
	out := []string{"out"}
	return []Case{
		{Name: "returns a FIFO", Script: `mkfifo out`, Outputs: out, Want: everywhere(noted("a FIFO")), Check: returns()},
		{Name: "returns a socket", Attack: "socket", Outputs: out, Want: everywhere(noted("a socket")), Check: returns()},
		{Name: "returns a directory with a FIFO", Script: `mkdir out; mkfifo out/f; echo x > out/x`, Outputs: out, Want: everywhere(noted("out/f")), Check: returns("out")},
		{Name: "returns a symlink to a device", Script: `ln -s /dev/zero out`, Outputs: out, Want: everywhere(harmless()), Check: returns("out")},
		{Name: "returns a symlink to a secret", Script: `ln -s "$SECRET" out`, Outputs: out, Want: everywhere(harmless()), Check: returns("out")},
		{Name: "returns what is behind a symlink to the host", Script: `rmdir out; ln -s /etc out`, Outputs: []string{"out/passwd"}, Want: everywhere(noted("leads out of the input root")), Check: returns()},
		{Name: "returns what is behind /proc/self", Script: `rm -r proc; ln -s /proc/self proc`, Outputs: []string{"proc/root/etc/passwd", "proc/environ"}, Want: everywhere(noted("leads out of the input root")), Check: returns()},
		{Name: "returns what is behind /proc/self/root by ..", Script: `rm -r a; ln -s ../../../../../../../etc a`, Outputs: []string{"a/passwd"}, Want: everywhere(noted("leads out of the input root")), Check: returns()},
		{Name: "returns a loop of symlinks", Script: `rmdir out; ln -s other out; ln -s out other`, Outputs: []string{"out/x"}, Want: everywhere(noted("lead nowhere")), Check: returns()},
		{Name: "returns a long symlink", Script: `ln -s "$(printf '%04000d' 0)" out`, Outputs: out, Want: everywhere(harmless()), Check: returns("out")},
		{Name: "returns a file without a mode", Script: `echo x > out; chmod 0 out`, Outputs: out, Want: asRoot(harmless(), noted("can't be read"))},
		{Name: "returns a directory that can't be read", Script: `mkdir out; echo x > out/x; chmod 0 out`, Outputs: out, Want: asRoot(harmless(), noted("can't be read"))},
		{Name: "returns a directory in which one can't be read", Script: `mkdir -p out/in; echo x > out/in/x; chmod 0 out/in`, Outputs: out, Want: asRoot(harmless(), fails(failedPrecondition, "can't be read"))},
		{Name: "returns a directory that can't be written to", Script: `mkdir out; echo x > out/x; chmod 555 out`, Outputs: out, Want: everywhere(harmless()), Check: returns("out")},
		{Name: "returns a name that is not UTF-8", Script: `mkdir out; echo x > out/$(printf '\377')`, Outputs: out, Want: everywhere(fails(failedPrecondition, "not UTF-8"))},
		{Name: "returns a symlink that is not UTF-8", Script: `ln -s $(printf '\377') out`, Outputs: out, Want: everywhere(fails(failedPrecondition, "not UTF-8"))},
		{Name: "returns odd names", Attack: "names", Outputs: []string{"names"}, Want: everywhere(harmless()), Check: returns("names")},
		{Name: "returns directories 3,000 levels deep", Attack: "deep", Outputs: []string{"deep"}, Want: everywhere(fails(failedPrecondition, "levels deep"))},
		{Name: "returns 2,000 files", Attack: "some-files", Outputs: []string{"many"}, Want: everywhere(harmless()), Check: returns("many")},
		{Name: "returns a sparse file of 1 TB", Script: `truncate -s 1T out`, Outputs: out, Want: everywhere(fails(resourceExhausted, "no room for an output"))},
		{Name: "returns a file of the host by another name", Script: `ln /etc/passwd out || ln "$PUBLIC" out`, Outputs: out, Want: inside(refused(), asUser())},
		{Name: "returns a secret by another name", Script: `ln "$SECRET" out`, Outputs: out, Want: each(refused(), refused(), asUser(), asUser())},
		{Name: "returns two names of one file", Script: `echo x > out; chmod 7777 out; ln out a`, Outputs: []string{"out", "a"}, Want: everywhere(harmless()), Check: returns("out", "a")},
		{Name: "returns files of the year 2100", Script: `echo x > out; touch -d 2100-01-01 out`, Outputs: out, Command: wantMtime, Want: everywhere(harmless()), Check: returns("out")},
	}
}

func wantMtime(c *repb.Command) { c.OutputNodeProperties = []string{"mtime", "unix_mode"} }

// returns checks that the result has just the outputs of those paths.
func returns(paths ...string) func(Way, *repb.ExecuteResponse) error {
	return func(_ Way, resp *repb.ExecuteResponse) error {
		var got []string
		for _, o := range resp.Result.GetOutputFiles() {
			got = append(got, o.Path)
		}
		for _, o := range resp.Result.GetOutputDirectories() {
			got = append(got, o.Path)
		}
		for _, o := range resp.Result.GetOutputSymlinks() {
			got = append(got, o.Path)
		}
		slices.Sort(got)
		slices.Sort(paths)
		if !slices.Equal(got, paths) {
			return fmt.Errorf("outputs %q, want %q", got, paths)
		}
		return nil
	}
}

func stdoutIs(want string) func(Way, *repb.ExecuteResponse) error {
	return func(_ Way, resp *repb.ExecuteResponse) error {
		if got := string(resp.Result.GetStdoutRaw()); !strings.HasPrefix(got, want) {
			return fmt.Errorf("stdout %q, want %q", got, want)
		}
		return nil
	}
}
