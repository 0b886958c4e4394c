//go:build linux

package persistent_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
	"github.com/mettle-build/mettle/mettle/worker/persistent"
	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/bare"
)

// testUID is apart from those of other tests that may run at the same time.
const testUID = 64970

// fixture is a pool with a store and a tool in it.
type fixture struct {
	*persistent.Pool
	dir      string
	store    *file.Store
	inputs   *persistent.Inputs
	registry *prometheus.Registry
	owner    inputroot.Owner
	log      *lines
	program  *repb.Digest // the tool
	starts   int
}

func newFixture(t testing.TB, change func(*persistent.Options)) *fixture {
	t.Helper()
	// Below the temporary directory itself, so that the tool's user can get there.
	base, err := os.MkdirTemp("", "persistent-test-") //nolint:usetesting // as said
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(base); err != nil {
			t.Errorf("something is left: %v", err)
		}
	})
	if err := os.Chmod(base, 0o711); err != nil { //nolint:gosec // as said
		t.Fatal(err)
	}
	f := &fixture{dir: base, registry: prometheus.NewRegistry(), log: &lines{}, store: shared.Store, program: shared.program}
	policy := inputroot.LinkAndAudit
	if os.Getuid() == 0 {
		f.owner, policy = inputroot.Owner{Set: true, UID: testUID, GID: testUID}, inputroot.Link
	}
	if f.inputs, err = persistent.NewInputs(f.store, policy); err != nil {
		t.Fatal(err)
	}
	o := persistent.Options{Dir: filepath.Join(base, "pool"), Owner: f.owner, MaxProcesses: 2, Logger: slog.New(slog.NewTextHandler(f.log, nil))}
	if o.Metrics, err = persistent.NewMetrics(f.registry); err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(&o)
	}
	if f.Pool, err = persistent.New(o); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(o.Dir, 0o711); err != nil { //nolint:gosec // without a sandbox, the tool has to get there
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return f
}

// shared is the store of all tests, with the tool in it.
//
//nolint:gochecknoglobals // set by TestMain
var shared *sharedStore

type sharedStore struct {
	*file.Store
	program *repb.Digest
}

func newShared() (*sharedStore, func() error, error) {
	dir, err := os.MkdirTemp("", "persistent-test-store-")
	if err != nil {
		return nil, nil, err
	}
	s := &sharedStore{}
	remove := func() error {
		if s.Store != nil {
			s.Close()
		}
		return os.RemoveAll(dir)
	}
	if s.Store, err = file.New(file.Options{Dir: dir}); err != nil {
		return nil, nil, errors.Join(err, remove())
	}
	exe, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return nil, nil, errors.Join(err, remove())
	}
	d, err := blob.PutBytes(context.Background(), s.Store, digest.SHA256, exe)
	if err != nil {
		return nil, nil, errors.Join(err, remove())
	}
	s.program = d.Proto()
	return s, remove, nil
}

// lines is a log.
type lines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (f *fixture) put(t testing.TB, data []byte) *repb.Digest {
	t.Helper()
	d, err := blob.PutBytes(t.Context(), f.store, digest.SHA256, data)
	if err != nil {
		t.Fatal(err)
	}
	return d.Proto()
}

func (f *fixture) putMessage(t testing.TB, m proto.Message) *repb.Digest {
	t.Helper()
	d, err := blob.PutMessage(t.Context(), f.store, digest.SHA256, m)
	if err != nil {
		t.Fatal(err)
	}
	return d.Proto()
}

func marked() *repb.NodeProperties {
	return &repb.NodeProperties{Properties: []*repb.NodeProperty{{Name: "bazel_tool_input"}}}
}

// action is one to be.
type action struct {
	protocol string            // default: proto
	files    map[string]string // beside the tool and its flag file, by path of two parts at most
	startup  []string          // beside the program
	env      []string          // KEY=value
	wd       string
	unmarked bool
	change   func(*persistent.Request)
	timeout  time.Duration
}

// do has the tool do steps, and cleans up.
func (f *fixture) do(t testing.TB, a action, steps ...string) (*persistent.Result, error) {
	t.Helper()
	defer f.Clean()
	return f.Do(t.Context(), f.request(t, a, steps...))
}

// outputs is do, which is to succeed, and what it has made.
func (f *fixture) outputs(t testing.TB, a action, steps ...string) (*persistent.Result, map[string]string) {
	t.Helper()
	defer f.Clean()
	return f.run(t, a, steps...)
}

func (f *fixture) run(t testing.TB, a action, steps ...string) (*persistent.Result, map[string]string) {
	t.Helper()
	res, err := f.Do(t.Context(), f.request(t, a, steps...))
	if err != nil {
		t.Fatalf("Do: %v", err)
	}
	out := make(map[string]string)
	all, _ := filepath.Glob(filepath.Join(res.Root, a.wd, "out", "*"))
	for _, p := range all {
		data, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		out[filepath.Base(p)] = string(data)
	}
	return res, out
}

func (f *fixture) request(t testing.TB, a action, steps ...string) persistent.Request {
	t.Helper()
	if a.protocol == "" {
		a.protocol = "proto"
	}
	tool := &repb.FileNode{Name: "tool", Digest: f.program, IsExecutable: true}
	lib := &repb.FileNode{Name: "lib", Digest: f.put(t, []byte("library"))}
	if !a.unmarked {
		tool.NodeProperties, lib.NodeProperties = marked(), marked()
	}
	dirs := map[string]*repb.Directory{
		"":      {Files: []*repb.FileNode{{Name: "flags", Digest: f.put(t, []byte(strings.Join(steps, "\n")+"\n"))}}},
		"tools": {Files: []*repb.FileNode{lib, tool}},
	}
	for p, text := range a.files {
		dir, name := filepath.Split(p)
		dir = strings.TrimSuffix(dir, "/")
		if dirs[dir] == nil {
			dirs[dir] = &repb.Directory{}
		}
		dirs[dir].Files = append(dirs[dir].Files, &repb.FileNode{Name: name, Digest: f.put(t, []byte(text))})
	}
	root := dirs[""]
	for name, d := range dirs {
		sortFiles(d)
		if name != "" {
			root.Directories = append(root.Directories, &repb.DirectoryNode{Name: name, Digest: f.putMessage(t, d)})
		}
	}
	sortDirectories(root)
	up := strings.Repeat("../", len(strings.FieldsFunc(a.wd, func(r rune) bool { return r == '/' })))
	command := &repb.Command{
		Arguments:            append(append([]string{up + "tools/tool"}, a.startup...), "@"+up+"flags"),
		EnvironmentVariables: []*repb.Command_EnvironmentVariable{{Name: toolEnv, Value: a.protocol}},
		WorkingDirectory:     a.wd,
	}
	for _, e := range append(a.env, "GORACE=atexit_sleep_ms=0") {
		name, value, _ := strings.Cut(e, "=")
		command.EnvironmentVariables = append(command.EnvironmentVariables, &repb.Command_EnvironmentVariable{Name: name, Value: value})
	}
	platform := &repb.Platform{Properties: []*repb.Platform_Property{{Name: "persistentWorkerKey", Value: "k"}, {Name: "persistentWorkerProtocol", Value: a.protocol}}}
	pt, err := persistent.Of(platform, command)
	if err != nil || pt == nil {
		t.Fatalf("Of: %v, %v", pt, err)
	}
	d, err := digest.FromProto(digest.SHA256, f.putMessage(t, root))
	if err != nil {
		t.Fatal(err)
	}
	r := persistent.Request{
		Tool: pt, Command: command, Root: d, Inputs: f.inputs, Directories: []string{filepath.Join(a.wd, "out")}, Timeout: 30 * time.Second,
		Start: f.start,
	}
	if a.timeout > 0 {
		r.Timeout = a.timeout
	}
	if a.change != nil {
		a.change(&r)
	}
	return r
}

func (f *fixture) start(s *runner.Streams) (runner.Runner, error) {
	f.starts++
	return bare.New(bare.Options{User: bare.User{Set: f.owner.Set, UID: f.owner.UID, GID: f.owner.GID}, Streams: s})
}

func toDigest(t testing.TB, d *repb.Digest) digest.Digest {
	t.Helper()
	got, err := digest.FromProto(digest.SHA256, d)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// missingInput is the digest of a Directory that is nowhere.
func missingInput(fn digest.Function) digest.Digest { return digest.Of(fn, []byte("nowhere")) }
