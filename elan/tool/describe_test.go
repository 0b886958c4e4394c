package tool_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/tool"
)

// results are Results in a map.
type results map[blob.EntryKey]*repb.ActionResult

func (r results) Get(_ context.Context, k blob.EntryKey) (*repb.ActionResult, error) {
	if got, ok := r[k]; ok {
		return got, nil
	}
	return nil, blob.ErrNotFound
}

func TestDescribe(t *testing.T) {
	s := newStore(t)
	file, input := put(t, s, "contents"), put(t, s, "")
	command := putMessage(t, s, &repb.Command{
		Arguments:            []string{"cc", "-o", "a b", "it's", "line\nbreak"},
		EnvironmentVariables: []*repb.Command_EnvironmentVariable{{Name: "PATH", Value: "/bin:/usr/bin"}},
		OutputPaths:          []string{"out"},
		WorkingDirectory:     "src",
	})
	root := putMessage(t, s, &repb.Directory{
		Files:    []*repb.FileNode{{Name: "a", Digest: file.Proto(), IsExecutable: true}, {Name: "b\x1b", Digest: input.Proto()}},
		Symlinks: []*repb.SymlinkNode{{Name: "c", Target: "a"}},
	})
	action := putMessage(t, s, &repb.Action{
		CommandDigest: command.Proto(), InputRootDigest: root.Proto(), Timeout: durationpb.New(90 * time.Second), DoNotCache: true,
		Platform: &repb.Platform{Properties: []*repb.Platform_Property{{Name: "OSFamily", Value: "linux"}}},
	})
	lonely := putMessage(t, s, &repb.Action{CommandDigest: digest.Of(digest.SHA256, []byte("absent")).Proto(), InputRootDigest: root.Proto()})
	start := time.Unix(1e9, 0)
	known := results{{Instance: "i", Action: action}: {
		OutputFiles: []*repb.OutputFile{{Path: "out", Digest: file.Proto(), IsExecutable: true}},
		OutputDirectories: []*repb.OutputDirectory{
			{Path: "d", TreeDigest: file.Proto()},
		},
		OutputSymlinks: []*repb.OutputSymlink{{Path: "l", Target: "out"}},
		StdoutRaw:      []byte("printed"),
		StderrDigest:   file.Proto(),
		ExecutionMetadata: &repb.ExecutedActionMetadata{
			Worker: "w1", QueuedTimestamp: timestamppb.New(start), WorkerStartTimestamp: timestamppb.New(start.Add(time.Second)),
		},
	}}
	commandText := `command: cc -o 'a b' 'it'\''s' $'line\nbreak'
working_directory: src
environment: PATH=/bin:/usr/bin
output_path: out
`
	rootText := "executable: a " + file.String() + "\nfile: \"b\\x1b\" " + input.String() + "\nsymlink: c -> a\n"
	for _, tc := range []struct {
		name string
		what tool.Description
		want string
	}{
		{"command", tool.Description{Kind: "command", Digest: command}, commandText},
		{"directory", tool.Description{Kind: "directory", Digest: root}, rootText},
		{"action", tool.Description{Kind: "action", Digest: action}, "action: " + action.String() + "\ncommand_digest: " + command.String() +
			"\ninput_root_digest: " + root.String() + "\ntimeout: 1m30s\ndo_not_cache: true\nplatform: OSFamily=linux\n" + commandText},
		{"action without its command", tool.Description{Kind: "action", Digest: lonely}, "action: " + lonely.String() + "\ncommand_digest: " + digest.Of(digest.SHA256, []byte("absent")).String() +
			"\ninput_root_digest: " + root.String() + "\ncommand: " + digest.Of(digest.SHA256, []byte("absent")).String() + " is not in the store\n"},
		{"tree", tool.Description{Kind: "tree", Digest: putMessage(t, s, &repb.Tree{Root: &repb.Directory{Symlinks: []*repb.SymlinkNode{{Name: "c", Target: "a"}}}})}, "symlink: c -> a\n"},
		{"result", tool.Description{Kind: "result", Digest: action, Instance: "i"}, "action: " + action.String() + "\nexit_code: 0\noutput_executable: out " + file.String() +
			"\noutput_tree: d/ " + file.String() + "\noutput_symlink: l -> out\nstdout: 7 bytes, in the result itself\nstderr: " + file.String() +
			"\nworker: w1\nqueued: 2001-09-09T01:46:40.000Z\nin_queue: 1s\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out strings.Builder
			if err := tool.Describe(t.Context(), &out, s, known, tc.what); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, out.String()); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
	for _, tc := range []struct {
		name string
		what tool.Description
		want error
	}{
		{"no result", tool.Description{Kind: "result", Digest: action, Instance: "j"}, blob.ErrNotFound},
		{"no blob", tool.Description{Kind: "action", Digest: digest.Of(digest.SHA256, []byte("absent"))}, blob.ErrNotFound},
		{"no command", tool.Description{Kind: "command", Digest: put(t, s, "\xff\xff")}, blob.ErrMalformed},
	} {
		if err := tool.Describe(t.Context(), io.Discard, s, known, tc.what); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
	}
}
