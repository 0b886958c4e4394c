//go:build linux

package hostile_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/hostile"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// uidBase is apart from those of other tests that may run at the same time, of this
// package too: what has the same user can be seen.
func uidBase() int { return 64300 + 4*(os.Getpid()%100) }

// machine is a worker with one slot, its store, and what else of a host actions may
// look for.
type machine struct {
	way     hostile.Way
	base    string
	store   *file.Store
	queue   *mem.Queue
	worker  *worker.Worker
	program *repb.Digest
	env     map[string]string
	updates chan *queuepb.Update
	ended   chan error
	n       int
	usual   hostile.View
	close   func()
}

// newMachine starts a worker that runs actions in that way. It ends with the test,
// or by close.
func newMachine(t *testing.T, way hostile.Way, slots int, changes ...func(*worker.Options)) *machine {
	t.Helper()
	m := &machine{way: way, base: makeBase(t), updates: make(chan *queuepb.Update, 1000), ended: make(chan error, 1)}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var cleanups []func()
	var once sync.Once
	m.close = func() {
		once.Do(func() {
			cancel()
			for _, f := range slices.Backward(cleanups) {
				f()
			}
			if err := os.RemoveAll(m.base); err != nil {
				t.Errorf("something is left: %v", err)
			}
		})
	}
	t.Cleanup(m.close)
	later := func(f func()) { cleanups = append(cleanups, f) }
	var err error
	if m.store, err = file.New(file.Options{Dir: filepath.Join(m.base, "store"), MaxBytes: 4 << 30}); err != nil {
		t.Fatal(err)
	}
	later(func() { m.store.Close() })
	actions, err := action.New(action.Options{Store: m.store, Entries: m.store})
	if err != nil {
		t.Fatal(err)
	}
	if m.queue, err = mem.New(mem.Options{LeaseTime: time.Minute, MaxAttempts: 1}); err != nil {
		t.Fatal(err)
	}
	later(func() { m.queue.Close() })
	m.makeHost(t, later)
	o := worker.Options{
		Jobs: m.queue, Updates: m.queue, Store: m.store, Actions: actions, Dir: filepath.Join(m.base, "work"), Name: "tester", Slots: slots, UIDBase: uidBase(),
		MinFreeDiskBytes: -1, MinFreeMemoryBytes: -1, MaxOutputBytes: 1 << 20, Hide: []string{m.base}, Isolation: worker.Bare, Logger: logger(t),
	}
	if way == hostile.Sandbox || way == hostile.PlainSandbox {
		o.Isolation = worker.Namespaces
	}
	for _, change := range changes {
		change(&o)
	}
	if m.worker, err = worker.New(o); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	receiving, stopReceiving := context.WithCancel(context.WithoutCancel(ctx))
	wg.Go(func() { m.ended <- m.worker.Run(ctx) })
	wg.Go(func() {
		_ = m.queue.ReceiveUpdates(receiving, "api", func(u *queuepb.Update) {
			if u.GetStage() == queuepb.Update_COMPLETED {
				m.updates <- u
			}
		})
	})
	later(func() {
		m.worker.Abort()
		stopReceiving()
		wg.Wait()
		if err := m.worker.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	m.program = m.putFile(t, "/proc/self/exe")
	m.usual = m.view(t)
	return m
}

// makeBase makes a directory, where possible in one that a sandbox shows, so that it
// is hidden there for a reason.
func makeBase(t *testing.T) string {
	t.Helper()
	base, err := os.MkdirTemp("/var/cache", "mettle-hostile-") //nolint:usetesting // users of slots can get there
	if err != nil {
		base, err = os.MkdirTemp("", "mettle-hostile-") //nolint:usetesting // likewise
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(base, 0o711); err != nil { //nolint:gosec // as said
		t.Fatal(err)
	}
	return base
}

// makeHost makes what attacks are after, and the variables that tell them of it.
func (m *machine) makeHost(t *testing.T, later func(func())) {
	t.Helper()
	at := func(name string) string { return filepath.Join(m.base, name) }
	mark := fmt.Sprintf("%d-%d", os.Getpid(), time.Now().UnixNano())
	m.env = map[string]string{
		"PATH": "/usr/bin:/bin", "GORACE": "atexit_sleep_ms=0", "MARK": mark, "LEFT": "hostile-" + mark,
		"SECRET": at("secret"), "PUBLIC": at("public"), "OPEN": at("open"), "STORE": at("store"), "WORK": at("work"), "SOCKET": at("socket"),
		"WORKER": strconv.Itoa(os.Getpid()), "LEFT_PORT": strconv.Itoa(freePort(t)),
	}
	m.writeFiles(t)
	if err := errors.Join(os.Mkdir(at("open"), 0o700), os.Chmod(at("open"), 0o777)); err != nil { //nolint:gosec // this is the point
		t.Fatal(err)
	}
	for variable, address := range map[string][2]string{
		"PORT": {"tcp", "127.0.0.1:0"}, "": {"unix", "@hostile-" + mark + "-worker"}, "SOCKET": {"unix", at("socket")},
	} {
		l, err := (&net.ListenConfig{}).Listen(t.Context(), address[0], address[1])
		if err != nil {
			t.Fatal(err)
		}
		if tcp, ok := l.Addr().(*net.TCPAddr); ok {
			m.env[variable] = strconv.Itoa(tcp.Port)
		}
		later(func() { l.Close() }) // what connects ends in the backlog
	}
	if err := os.Chmod(at("socket"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := m.put(t, strings.Repeat("a blob of others\n", 10_000))
	m.env["BLOB"] = m.blobPath(t, d)
	later(func() { m.removeLeft() })
}

// files are those of the host that attacks read and write.
func files() map[string]os.FileMode { return map[string]os.FileMode{"secret": 0o600, "public": 0o644} }

func (m *machine) writeFiles(t *testing.T) {
	t.Helper()
	for name, mode := range files() {
		if err := os.WriteFile(filepath.Join(m.base, name), []byte(name), mode); err != nil {
			t.Fatal(err)
		}
	}
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// blobPath is the file of a blob.
func (m *machine) blobPath(t *testing.T, d *repb.Digest) string {
	t.Helper()
	var found string
	_ = filepath.WalkDir(filepath.Join(m.base, "store"), func(path string, _ os.DirEntry, _ error) error {
		if strings.Contains(filepath.Base(path), d.Hash) || strings.HasPrefix(d.Hash, filepath.Base(filepath.Dir(path))) && strings.Contains(path, d.Hash[2:]) {
			found = path
		}
		return nil
	})
	if found == "" {
		t.Fatal("the store has no file of the blob")
	}
	return found
}

// removeLeft removes what attacks have left on the host.
func (m *machine) removeLeft() {
	for _, dir := range []string{"/tmp", "/var/tmp", "/dev/shm", m.env["OPEN"]} {
		left, _ := filepath.Glob(filepath.Join(dir, m.env["LEFT"]+"*"))
		for _, path := range left {
			_ = os.RemoveAll(path)
		}
	}
	hostile.RemoveIPC(m.env["MARK"])
}

func (m *machine) put(t *testing.T, data string) *repb.Digest {
	t.Helper()
	d, err := blob.PutBytes(t.Context(), m.store, digest.SHA256, []byte(data))
	if err != nil {
		t.Fatal(err)
	}
	return d.Proto()
}

func (m *machine) putFile(t *testing.T, path string) *repb.Digest {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return m.put(t, string(data))
}

func (m *machine) putMessage(t *testing.T, msg proto.Message) *repb.Digest {
	t.Helper()
	d, err := blob.PutMessage(t.Context(), m.store, digest.SHA256, msg)
	if err != nil {
		t.Fatal(err)
	}
	return d.Proto()
}

// What the inputs are. They are as large as blobs that have a file of their own.
func bigInput() string   { return strings.Repeat("good\n", 20_000) }
func belowInput() string { return strings.Repeat("good too\n", 20_000) }
func toolInput() string  { return "#!/bin/sh\nexit 0\n" + strings.Repeat("# a tool\n", 10_000) }

// root is the input root of all actions. What is gone, the client puts again.
func (m *machine) root(t *testing.T) *repb.Digest {
	t.Helper()
	dir := &repb.Directory{Files: []*repb.FileNode{{Name: "big", Digest: m.put(t, belowInput())}}}
	return m.putMessage(t, &repb.Directory{
		Files: []*repb.FileNode{
			{Name: "big", Digest: m.put(t, bigInput())},
			{Name: hostile.ProgramName, Digest: m.program, IsExecutable: true},
			{Name: "orphan", Digest: m.put(t, "#!/no/such/interpreter\n"), IsExecutable: true},
			{Name: "tool", Digest: m.put(t, toolInput()), IsExecutable: true},
		},
		Directories: []*repb.DirectoryNode{{Name: "dir", Digest: m.putMessage(t, dir)}},
	})
}

// publish makes a job of a Command.
func (m *machine) publish(t *testing.T, c *repb.Command) *queuepb.Job {
	t.Helper()
	m.n++
	for _, name := range []string{"GORACE", "BLOB", "LEFT", "LEFT_PORT", "MARK", "OPEN", "PATH", "PORT", "PUBLIC", "SECRET", "SOCKET", "STORE", "WORK", "WORKER"} {
		c.EnvironmentVariables = append(c.EnvironmentVariables, &repb.Command_EnvironmentVariable{Name: name, Value: m.env[name]})
	}
	d := m.putMessage(t, &repb.Action{
		CommandDigest: m.putMessage(t, c), InputRootDigest: m.root(t), DoNotCache: true, Salt: fmt.Append(nil, m.n),
	})
	job := &queuepb.Job{
		Operation: fmt.Sprint("operation ", m.n), ReplyTo: "api", Pool: queue.DefaultPool,
		ActionDigest: fmt.Sprintf("%s/%d", d.Hash, d.SizeBytes), Queued: timestamppb.Now(),
	}
	if err := m.queue.Publish(t.Context(), job); err != nil {
		t.Fatal(err)
	}
	return job
}

// patience is far longer than any action takes, on a disk that others use too.
const patience = 5 * time.Minute

// wait returns the response of a job.
func (m *machine) wait(t *testing.T, job *queuepb.Job) *repb.ExecuteResponse {
	t.Helper()
	late := time.NewTimer(patience)
	defer late.Stop()
	for {
		select {
		case u := <-m.updates:
			if u.Operation != job.Operation {
				continue
			}
			resp := &repb.ExecuteResponse{}
			if err := proto.Unmarshal(u.ExecuteResponse, resp); err != nil {
				t.Fatal(err)
			}
			return resp
		case err := <-m.ended:
			m.ended <- err
			t.Fatalf("the worker ended: %v", err)
		case <-late.C:
			t.Fatalf("no response within %v", patience)
		}
	}
}

func (m *machine) execute(t *testing.T, c *repb.Command) *repb.ExecuteResponse {
	t.Helper()
	return m.wait(t, m.publish(t, c))
}

// view is what an action sees.
func (m *machine) view(t *testing.T) hostile.View {
	t.Helper()
	resp := m.execute(t, &repb.Command{Arguments: hostile.ViewArguments()})
	if resp.Status.GetCode() != 0 || resp.Result.GetExitCode() != 0 {
		t.Fatalf("an action that looks around: status %v, exit code %d, stderr %s", resp.Status, resp.Result.GetExitCode(), resp.Result.GetStderrRaw())
	}
	v, err := hostile.ParseView([]byte(m.read(t, resp.Result.StdoutDigest)))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func (m *machine) read(t *testing.T, p *repb.Digest) string {
	t.Helper()
	d, err := digest.FromProto(digest.SHA256, p)
	if err != nil {
		t.Fatal(err)
	}
	data, err := blob.ReadAll(t.Context(), m.store, d, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// waitFor waits until there is a file like that in the worker's directory.
func (m *machine) waitFor(t *testing.T, pattern string) {
	t.Helper()
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		if found, _ := filepath.Glob(filepath.Join(m.env["WORK"], pattern)); len(found) > 0 {
			return
		}
		if time.Since(start) > patience {
			t.Fatalf("no %s", pattern)
		}
	}
}
