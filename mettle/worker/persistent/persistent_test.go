//go:build linux

package persistent_test

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
)

func sortFiles(d *repb.Directory) {
	slices.SortFunc(d.Files, func(a, b *repb.FileNode) int { return cmp.Compare(a.Name, b.Name) })
}

func sortDirectories(d *repb.Directory) {
	slices.SortFunc(d.Directories, func(a, b *repb.DirectoryNode) int { return cmp.Compare(a.Name, b.Name) })
}

func TestPool_Do(t *testing.T) {
	for _, protocol := range []string{"proto", "json"} {
		t.Run(protocol, func(t *testing.T) {
			f := newFixture(t, nil)
			var pid string
			for i := range 5 {
				a := action{protocol: protocol, files: map[string]string{"src/a": fmt.Sprint("source ", i), "src/only" + fmt.Sprint(i): "x", "tools/data": "y"}}
				res, out := f.outputs(t, a, "copy:src/a:out/a", "count:out/count", "pid:out/pid", "say:warning", "ls:out/ls", "exit:7", "unknown")
				if res.ExitCode != 7 || res.Output != "warning\n" || res.Before != int64(i) || res.Failures != 0 {
					t.Errorf("result %+v", res)
				}
				if out["a"] != fmt.Sprint("source ", i) || out["count"] != fmt.Sprint(i) {
					t.Errorf("outputs %q", out)
				}
				if pid == "" {
					pid = out["pid"]
				}
				if out["pid"] != pid {
					t.Errorf("process %s, then %s", pid, out["pid"])
				}
				want := fmt.Sprintf(". flags out out/a out/count out/pid src src/a src/only%d tools tools/data tools/lib tools/tool", i)
				if got := strings.Join(strings.Fields(out["ls"]), " "); got != want {
					t.Errorf("in the root: %s\nwant %s", got, want)
				}
				if res.Start.Before(res.Fetched) == (i > 0) || res.End.Before(res.Start) || res.Spent <= 0 {
					t.Errorf("times %+v", res)
				}
			}
			if f.starts != 1 {
				t.Errorf("%d processes", f.starts)
			}
		})
	}
}
