package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A tool that speaks the worker protocol, in JSON, and a rule that uses it. Where the
// tool is kept running, it counts its requests.
const (
	workerTool = `#!/bin/sh
n=0
work() { echo "$(cat "$1"), after $n others" > "$2"; }
case "$*" in
*--persistent_worker*)
	while read -r line; do
		set -- $(echo "$line" | sed 's/.*"arguments": *\[ *"\([^"]*\)", *"\([^"]*\)".*/\1 \2/')
		work "$1" "$2"
		n=$((n+1))
		echo '{"exitCode":0,"output":""}'
	done;;
*)
	n=no
	set -- $(cat "${1#@}")
	work "$1" "$2";;
esac
`
	workerRules = `
def _impl(ctx):
    out = ctx.actions.declare_file(ctx.label.name + ".out")
    args = ctx.actions.args()
    args.use_param_file("@%s", use_always = True)
    args.set_param_file_format("multiline")
    args.add(ctx.file.src)
    args.add(out)
    ctx.actions.run(
        executable = ctx.executable.tool,
        arguments = [args],
        inputs = [ctx.file.src],
        outputs = [out],
        mnemonic = "Work",
        execution_requirements = {"supports-workers": "1", "requires-worker-protocol": "json"},
    )
    return [DefaultInfo(files = depset([out]))]

work = rule(
    implementation = _impl,
    attrs = {
        "src": attr.label(allow_single_file = True),
        "tool": attr.label(executable = True, cfg = "exec", default = "//worker:tool"),
    },
)
`
	workerBuild = `
load(":rules.bzl", "work")
sh_binary(name = "tool", srcs = ["tool.sh"])
[work(name = "w%d" % i, src = "%d.in" % i, exec_properties = {"supports-workers": "1", "requires-worker-protocol": "json"}) for i in range(4)]
work(name = "plain", src = "0.in")
`
)

// Bazel's actions that are marked for it are done by one process of their tool.
func TestBazel_persistentWorkers(t *testing.T) {
	s := startDual(t, storeDir(t), "--slots=1")
	needsSandbox(t, s)
	b := newBazel(t)
	b.Write("worker/BUILD", workerBuild)
	b.Write("worker/rules.bzl", workerRules)
	b.Write("worker/tool.sh", workerTool)
	if err := os.Chmod(filepath.Join(b.Workspace, "worker", "tool.sh"), 0o755); err != nil { //nolint:gosec // a test's workspace
		t.Fatal(err)
	}
	for i := range 4 {
		b.Write(fmt.Sprintf("worker/%d.in", i), fmt.Sprintf("source %d\n", i))
	}
	b.MustRun("build", append(b.remote(s), "//worker:all")...)
	read := func(name string) string {
		data, err := os.ReadFile(filepath.Join(b.bin(), "worker", name+".out"))
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(data))
	}
	if got, want := read("plain"), "source 0, after no others"; got != want {
		t.Errorf("not marked: %q, want %q", got, want)
	}
	var after []string
	for i := range 4 {
		source, others, _ := strings.Cut(read(fmt.Sprint("w", i)), ", ")
		if want := fmt.Sprint("source ", i); source != want {
			t.Errorf("output %q, want %q", source, want)
		}
		after = append(after, others)
	}
	slices.Sort(after)
	if got, want := strings.Join(after, "; "), "after 0 others; after 1 others; after 2 others; after 3 others"; got != want {
		t.Errorf("the outputs are %s, want %s", got, want)
	}
}
