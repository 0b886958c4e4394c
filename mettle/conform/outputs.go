package conform

import (
	"context"
	"fmt"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// tree is the Tree of an output directory, which is to be there.
func (t *T) tree(ctx context.Context, r *repb.ActionResult, path string) *repb.Tree {
	for _, d := range r.GetOutputDirectories() {
		if d.Path != path {
			continue
		}
		if d.TreeDigest == nil {
			t.fatalf("output directory %s has no tree_digest", path)
		}
		data, err := t.read(ctx, t.readName(d.TreeDigest), 0, 0)
		t.ok("Read of a Tree", err)
		tree := &repb.Tree{}
		if err := proto.Unmarshal(data, tree); err != nil {
			t.fatalf("the Tree of %s: %v", path, err)
		}
		return tree
	}
	t.fatalf("there is no output directory %s in %v", path, r)
	return nil
}

// names are the paths of all that a result has.
func names(r *repb.ActionResult) []string {
	var all []string
	for _, f := range r.GetOutputFiles() {
		all = append(all, f.Path)
	}
	for _, d := range r.GetOutputDirectories() {
		all = append(all, d.Path)
	}
	for _, s := range slices.Concat(r.GetOutputSymlinks(), r.GetOutputFileSymlinks(), r.GetOutputDirectorySymlinks()) {
		if !slices.Contains(all, s.Path) {
			all = append(all, s.Path)
		}
	}
	slices.Sort(all)
	return all
}

func outputCases() []Case {
	return slices.Concat(outputFileCases(), outputDirectoryCases(), oldOutputCases())
}

//nolint:revive // a table
func outputFileCases() []Case {
	exec := []need{needsExecution}
	paths := append(exec, needsVersion(1))
	const listed = "Only the listed paths will be returned to the client as output."
	return []Case{
		{Name: "outputs/file", Clause: "If the resulting path is a file, it will be returned in an [OutputFile][build.bazel.remote.execution.v2.OutputFile] typed field.", Needs: paths, run: func(ctx context.Context, t *T) {
			r := t.run(ctx, shell("printf made > out", "out")).Result
			t.same("out", t.output(ctx, r, "out"), []byte("made"))
		}},
		{Name: "outputs/executable", Clause: "True if file is executable, false otherwise.", Needs: paths, run: func(ctx context.Context, t *T) {
			for _, f := range t.run(ctx, shell("echo > a; echo > b; chmod +x b", "a", "b")).Result.OutputFiles {
				if f.IsExecutable != (f.Path == "b") {
					t.errorf("is_executable of %s is %v", f.Path, f.IsExecutable)
				}
			}
		}},
		{Name: "outputs/only_what_is_listed", Clause: listed, Needs: paths, run: func(ctx context.Context, t *T) {
			if got := names(t.run(ctx, shell("echo > a; echo > b; mkdir c", "a")).Result); !slices.Equal(got, []string{"a"}) {
				t.errorf("the outputs are %q, want a alone", got)
			}
		}},
		{Name: "outputs/not_made", Clause: "If the action does not produce the requested output, then that output will be omitted from the list.", Needs: paths, run: func(ctx context.Context, t *T) {
			r := t.run(ctx, shell("echo > a", "a", "b"))
			if got := names(r.Result); !slices.Equal(got, []string{"a"}) || r.Result.ExitCode != 0 {
				t.errorf("the outputs are %q, exit_code %d; want a alone, and 0", got, r.Result.ExitCode)
			}
		}},
		{Name: "outputs/parents_are_made", Clause: "Directories leading up to the output paths are created by the worker prior to execution, even if they are not explicitly part of the input root.", Needs: paths, run: func(ctx context.Context, t *T) {
			r := t.run(ctx, shell("echo x > a/b/out", "a/b/out")).Result
			t.same("a/b/out", t.output(ctx, r, "a/b/out"), []byte("x\n"))
		}},
		{Name: "outputs/output_itself_is_not_made", Clause: "Directories leading up to the output paths are created by the worker prior to execution", Needs: paths, run: func(ctx context.Context, t *T) {
			if r := t.run(ctx, shell("test ! -e a/dir", "a/dir")).Result; r.ExitCode != 0 {
				t.errorf("the output path is there before the command runs")
			}
		}},
		{Name: "outputs/empty_file", Clause: "The digest of the file's content.", Needs: paths, run: func(ctx context.Context, t *T) {
			fs := t.run(ctx, shell(": > out", "out")).Result.OutputFiles
			if len(fs) != 1 || fs[0].GetDigest().GetSizeBytes() != 0 || fs[0].GetDigest().GetHash() == "" {
				t.errorf("an empty output is %v", fs)
			}
		}},
		{Name: "outputs/symlink", Clause: "A single entry for each output requested in `output_paths` field of the Action, if the corresponding path existed after the action completed and was a symbolic link.", Needs: paths, run: func(ctx context.Context, t *T) {
			r := t.run(ctx, shell("echo > a; ln -s a l", "a", "l")).Result
			if len(r.OutputSymlinks) != 1 || r.OutputSymlinks[0].Path != "l" || r.OutputSymlinks[0].Target != "a" {
				t.errorf("output_symlinks are %v", r.OutputSymlinks)
			}
		}},
		{Name: "outputs/dangling_symlink", Clause: "The output paths of the action that are symbolic links to other paths.", Needs: paths, run: func(ctx context.Context, t *T) {
			r := t.run(ctx, shell("ln -s nowhere l", "l")).Result
			if got := names(r); !slices.Equal(got, []string{"l"}) {
				t.errorf("the outputs are %q", got)
			}
		}},
		{Name: "outputs/host_files_stay_there", Clause: listed, Needs: paths, run: func(ctx context.Context, t *T) {
			e := t.execute(ctx, shell("rm -rf d; ln -s /etc d", "d/passwd"))
			for _, f := range e.response.GetResult().GetOutputFiles() {
				t.errorf("an output behind a symlink to /etc is returned as a file of %d bytes", f.GetDigest().GetSizeBytes())
			}
		}},
		{Name: "outputs/of_a_failure", Clause: "the server may populate the output-, stdout-, and stderr-related fields if it has any information available", Level: Should, Needs: paths, run: func(ctx context.Context, t *T) {
			r := t.run(ctx, shell("echo log > out; exit 3", "out")).Result
			if r.ExitCode != 3 {
				t.errorf("exit_code is %d", r.ExitCode)
			}
			t.same("the output of a command that failed", t.output(ctx, r, "out"), []byte("log\n"))
		}},
		{Name: "outputs/many", Clause: "A list of the output paths that the client expects to retrieve from the action.", Needs: paths, run: func(ctx context.Context, t *T) {
			var outs []string
			for i := range 200 {
				outs = append(outs, fmt.Sprintf("o/%03d", i))
			}
			if got := names(t.run(ctx, shell(`i=0; while [ $i -lt 200 ]; do printf '%s' $i > $(printf 'o/%03d' $i); i=$((i+1)); done`, outs...)).Result); len(got) != 200 {
				t.errorf("%d of 200 outputs", len(got))
			}
		}},
		{Name: "outputs/large", Clause: "The digest of the file's content.", Needs: paths, run: func(ctx context.Context, t *T) {
			r := t.run(ctx, shell("head -c 20000000 /dev/zero > out", "out")).Result
			if got := t.output(ctx, r, "out"); len(got) != 20_000_000 {
				t.errorf("an output of 20 MB has %d bytes", len(got))
			}
		}},
		{Name: "outputs/inlined_when_asked", Clause: "A hint to the server to inline the contents of the listed output files.", Needs: paths, run: func(ctx context.Context, t *T) {
			k := shell("printf made > out", "out")
			k.request.InlineOutputFiles = []string{"out"}
			r := t.run(ctx, k).Result
			if len(r.OutputFiles) == 1 && len(r.OutputFiles[0].Contents) > 0 {
				t.same("contents", r.OutputFiles[0].Contents, []byte("made"))
			}
			t.same("out", t.output(ctx, r, "out"), []byte("made")) // it is in the CAS all the same
		}},
		{Name: "outputs/are_in_the_cas", Clause: "Implementations SHOULD ensure that any blobs referenced from the", Level: Should, Needs: paths, run: func(ctx context.Context, t *T) {
			r := t.run(ctx, shell("echo a > a; mkdir d; echo b > d/b; echo printed", "a", "d")).Result
			tree := t.tree(ctx, r, "d")
			ds := []*repb.Digest{r.OutputFiles[0].Digest, tree.GetRoot().GetFiles()[0].GetDigest()}
			if r.StdoutDigest != nil {
				ds = append(ds, r.StdoutDigest)
			}
			if m := t.missing(ctx, ds...); len(m) > 0 {
				t.errorf("%v of the result are missing", m)
			}
		}},
	}
}

//nolint:revive // a table
func outputDirectoryCases() []Case {
	paths := []need{needsExecution, needsVersion(1)}
	const wholeTree = "If the path is a directory, the entire directory structure will be returned as a [Tree][build.bazel.remote.execution.v2.Tree] message digest"
	script := "mkdir -p d/sub/deep d/empty; echo 1 > d/f; echo 2 > d/sub/g; chmod +x d/sub/g; echo 3 > d/sub/deep/h; ln -s f d/link"
	return []Case{
		{Name: "outputs/directory", Clause: wholeTree, Needs: paths, run: func(ctx context.Context, t *T) {
			tree := t.tree(ctx, t.run(ctx, shell(script, "d")).Result, "d")
			root := tree.GetRoot()
			if len(root.GetFiles()) != 1 || len(root.GetDirectories()) != 2 || len(root.GetSymlinks()) != 1 || root.GetSymlinks()[0].GetTarget() != "f" {
				t.errorf("the root of the Tree is %v", root)
			}
			if len(tree.GetChildren()) != 3 {
				t.errorf("the Tree has %d children, want 3: sub, deep and empty", len(tree.GetChildren()))
			}
		}},
		{Name: "outputs/empty_directory", Clause: wholeTree, Needs: paths, run: func(ctx context.Context, t *T) {
			tree := t.tree(ctx, t.run(ctx, shell("mkdir d", "d")).Result, "d")
			if proto.Size(tree.GetRoot()) != 0 || len(tree.GetChildren()) != 0 {
				t.errorf("the Tree of an empty directory is %v", tree)
			}
		}},
		{Name: "outputs/tree_is_deterministic", Clause: "Servers SHOULD ensure that these are ordered consistently such that two actions producing equivalent output directories on the same server implementation also produce Tree messages with matching digests.", Level: Should, Needs: paths, run: func(ctx context.Context, t *T) {
			a := t.run(ctx, shell("mkdir d; for i in 1 2 3 4 5 6 7 8; do mkdir d/$i; echo $i > d/$i/f; done", "d")).Result
			b := t.run(ctx, shell("mkdir d; for i in 8 3 5 1 7 2 6 4; do mkdir d/$i; echo $i > d/$i/f; done", "d")).Result
			if da, db := a.OutputDirectories[0].TreeDigest, b.OutputDirectories[0].TreeDigest; !proto.Equal(da, db) {
				t.errorf("two equal directories have the Trees %v and %v", da, db)
			}
		}},
		{Name: "outputs/tree_is_canonical", Clause: "The files, directories and symlinks in the directory must each be sorted in lexicographical order by path.", Needs: paths, run: func(ctx context.Context, t *T) {
			tree := t.tree(ctx, t.run(ctx, shell("mkdir d; cd d; for i in b a C 10 9; do echo > f$i; mkdir d$i; ln -s x l$i; done", "d")).Result, "d")
			var files, dirs, links []string
			for _, f := range tree.GetRoot().GetFiles() {
				files = append(files, f.Name)
			}
			for _, d := range tree.GetRoot().GetDirectories() {
				dirs = append(dirs, d.Name)
			}
			for _, l := range tree.GetRoot().GetSymlinks() {
				links = append(links, l.Name)
			}
			for _, list := range [][]string{files, dirs, links} {
				if len(list) != 5 || !slices.IsSorted(list) {
					t.errorf("%q are not five sorted names", list)
				}
			}
		}},
		{Name: "outputs/working_directory_as_output", Clause: "The empty string value is allowed, and it denotes the entire working directory.", Level: Should, Needs: paths, run: func(ctx context.Context, t *T) {
			tree := t.tree(ctx, t.run(ctx, shell("echo x > made", "")).Result, "")
			if len(tree.GetRoot().GetFiles()) != 1 {
				t.errorf("the Tree is %v", tree)
			}
		}},
		{Name: "outputs/directory_format", Clause: "The client is only interested in receiving output directories in the form of a hierarchy of separately stored Directory objects, using the `root_directory_digest` field.", Level: Should, Needs: paths, run: func(ctx context.Context, t *T) {
			k := shell(script, "d")
			k.command.OutputDirectoryFormat = repb.Command_DIRECTORY_ONLY
			ds := t.run(ctx, k).Result.OutputDirectories
			if len(ds) != 1 {
				t.fatalf("output_directories are %v", ds)
			}
			if ds[0].RootDirectoryDigest == nil {
				if ds[0].TreeDigest == nil {
					t.errorf("there is neither root_directory_digest nor tree_digest")
				}
				t.skipf("the server does not support DIRECTORY_ONLY, and returns a Tree, as it may")
			}
			got, _, err := t.getTree(ctx, ds[0].RootDirectoryDigest, 0)
			t.ok("GetTree of root_directory_digest", err)
			if len(got) != 4 {
				t.errorf("%d directories are stored, want 4", len(got))
			}
		}},
		{Name: "outputs/both_formats", Clause: "If both `tree_digest` and `root_directory_digest` are set, this field MUST match the digest of the root directory contained in the Tree message.", Needs: paths, run: func(ctx context.Context, t *T) {
			k := shell(script, "d")
			k.command.OutputDirectoryFormat = repb.Command_TREE_AND_DIRECTORY
			r := t.run(ctx, k).Result
			if len(r.OutputDirectories) != 1 || r.OutputDirectories[0].RootDirectoryDigest == nil {
				t.skipf("the server does not support TREE_AND_DIRECTORY")
			}
			data, err := proto.MarshalOptions{Deterministic: true}.Marshal(t.tree(ctx, r, "d").GetRoot())
			if want := t.digest(data); err != nil || !proto.Equal(r.OutputDirectories[0].RootDirectoryDigest, want) {
				t.errorf("root_directory_digest is %v, the Tree's root has %v", r.OutputDirectories[0].RootDirectoryDigest, want)
			}
		}},
		{Name: "outputs/topologically_sorted", Clause: "Directories are stored in topological order, with parents being stored before the child.", Needs: paths, run: func(ctx context.Context, t *T) {
			r := t.run(ctx, shell(script, "d")).Result
			if len(r.OutputDirectories) != 1 || !r.OutputDirectories[0].IsTopologicallySorted {
				t.skipf("the server does not say that its Trees are sorted")
			}
			known := map[string]bool{}
			tree := t.tree(ctx, r, "d")
			for i, d := range append([]*repb.Directory{tree.GetRoot()}, tree.GetChildren()...) {
				data, err := proto.MarshalOptions{Deterministic: true}.Marshal(d)
				if err != nil || i > 0 && !known[t.digest(data).Hash] {
					t.errorf("directory %d of the Tree comes before its parent", i)
				}
				for _, c := range d.GetDirectories() {
					known[c.GetDigest().GetHash()] = true
				}
			}
		}},
		{Name: "outputs/node_properties", Clause: "A list of keys for node properties the client expects to retrieve for output files and directories.", Level: Should, Needs: paths, run: func(ctx context.Context, t *T) {
			k := shell("echo > out; chmod 640 out; touch -d @1000000000 out", "out")
			k.command.OutputNodeProperties = []string{"mtime", "unix_mode"}
			e := t.execute(ctx, k)
			if e.refused() != nil {
				t.want("Execute that asks for mtime and unix_mode", e.refused(), codes.InvalidArgument)
				t.skipf("the server knows no node properties, and says so")
			}
			p := e.response.GetResult().GetOutputFiles()[0].GetNodeProperties()
			if p.GetMtime().GetSeconds() != 1_000_000_000 || p.GetUnixMode().GetValue()&0o777 != 0o640 {
				t.errorf("node_properties are %v, want mtime 1000000000 and unix_mode 0640", p)
			}
		}},
	}
}

func oldOutputCases() []Case {
	exec := []need{needsExecution}
	old := func(script string, files, dirs []string) *task {
		k := shell(script)
		k.command.OutputFiles, k.command.OutputDirectories = files, dirs
		return k
	}
	return []Case{
		{Name: "outputs/2.0_files", Clause: "A list of the output files that the client expects to retrieve from the action.", Needs: exec, run: func(ctx context.Context, t *T) {
			r := t.run(ctx, old("printf made > out", []string{"out"}, nil)).Result
			t.same("out", t.output(ctx, r, "out"), []byte("made"))
		}},
		{Name: "outputs/2.0_directories", Clause: "A list of the output directories that the client expects to retrieve from the action.", Needs: exec, run: func(ctx context.Context, t *T) {
			tree := t.tree(ctx, t.run(ctx, old("mkdir -p d; echo > d/f", nil, []string{"d"})).Result, "d")
			if len(tree.GetRoot().GetFiles()) != 1 {
				t.errorf("the Tree is %v", tree)
			}
		}},
		{Name: "outputs/2.0_file_is_a_directory", Clause: "If an output listed in `output_files` was found, but was a directory rather than a regular file, the server will return a FAILED_PRECONDITION.", Needs: exec, run: func(ctx context.Context, t *T) {
			t.want("an output file that is a directory", t.execute(ctx, old("mkdir out", []string{"out"}, nil)).refused(), codes.FailedPrecondition)
		}},
		{Name: "outputs/2.0_directory_is_a_file", Clause: "but was not a directory, the server will return a FAILED_PRECONDITION.", Needs: exec, run: func(ctx context.Context, t *T) {
			t.want("an output directory that is a file", t.execute(ctx, old("echo > out", nil, []string{"out"})).refused(), codes.FailedPrecondition)
		}},
		{Name: "outputs/2.0_symlinks", Clause: "Servers that wish to be compatible with v2.0 API should still populate this field in addition to `output_symlinks`.", Level: Should, Needs: exec, run: func(ctx context.Context, t *T) {
			r := t.run(ctx, old("echo > a; ln -s a l; mkdir d; ln -s d dl", []string{"a", "l"}, []string{"d", "dl"})).Result
			if s := r.OutputFileSymlinks; len(s) != 1 || s[0].Target != "a" {
				t.errorf("output_file_symlinks are %v", s)
			}
			if s := r.OutputDirectorySymlinks; len(s) != 1 || s[0].Target != "d" {
				t.errorf("output_directory_symlinks are %v", s)
			}
		}},
		{Name: "outputs/paths_win", Clause: "If `output_paths` is used, `output_files` and `output_directories` will be ignored!", Needs: append(exec, needsVersion(1)), run: func(ctx context.Context, t *T) {
			k := old("echo > a; echo > b", []string{"b"}, nil)
			k.command.OutputPaths = []string{"a"}
			if got := names(t.run(ctx, k).Result); !slices.Equal(got, []string{"a"}) {
				t.errorf("the outputs are %q, want a alone", got)
			}
		}},
	}
}
