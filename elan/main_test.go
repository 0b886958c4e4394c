package main

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// announced takes what a server prints, and gives the address in it.
type announced struct{ addr chan string }

var addrPattern = regexp.MustCompile(`grpc://(\S+)`)

func (a announced) Write(p []byte) (int, error) {
	if m := addrPattern.FindSubmatch(p); m != nil {
		a.addr <- string(m[1])
	}
	return len(p), nil
}

// serve serves the store in dir until stop is called, or the test ends.
func serve(t *testing.T, host, dir string, options ...func(*serveCmd)) (addr string, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	out, done := announced{addr: make(chan string, 1)}, make(chan error, 1)
	cmd := &serveCmd{Storage: []string{"file://" + dir}, Host: host, HTTPPort: -1}
	for _, option := range options {
		option(cmd)
	}
	go func() { done <- cmd.Run(ctx, out, slog.New(slog.DiscardHandler)) }()
	ended := false
	stop = func() {
		cancel()
		if ended {
			return
		}
		ended = true
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	}
	t.Cleanup(stop)
	select {
	case addr = <-out.addr:
	case err := <-done:
		t.Fatalf("serve: %v", err)
	}
	return addr, stop
}

// result is what came of a command line.
type result struct {
	status      int
	out, errors string
}

func elan(t *testing.T, stdin string, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	status := run(args, strings.NewReader(stdin), &out, &errs)
	return result{status: status, out: out.String(), errors: errs.String()}
}

// ok is elan for what must succeed. It returns the output.
func ok(t *testing.T, args ...string) string {
	t.Helper()
	r := elan(t, "", args...)
	if r.status != 0 || r.errors != "" {
		t.Fatalf("elan %v: exit status %d, %s", args, r.status, r.errors)
	}
	return r.out
}

// fails is elan for what must end with the status, and say what.
func fails(t *testing.T, status int, what string, args ...string) result {
	t.Helper()
	r := elan(t, "", args...)
	if r.status != status || !strings.Contains(r.errors, what) {
		t.Errorf("elan %v: exit status %d, errors %q; want %d and %q", args, r.status, r.errors, status, what)
	}
	return r
}

// write makes a file of a new directory.
func write(t *testing.T, name, data string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestTools: the same life of some blobs on a server and on a store by its URL.
func TestTools(t *testing.T) {
	for _, tc := range []struct {
		name   string
		target func(t *testing.T) string
	}{
		{"server", func(t *testing.T) string {
			addr, _ := serve(t, "127.0.0.1", t.TempDir()+"/store")
			return "--remote=" + addr
		}},
		{"storage", func(t *testing.T) string { return "--storage=file://" + t.TempDir() }},
	} {
		t.Run(tc.name, func(t *testing.T) { testTools(t, tc.target(t)) })
	}
}

func testTools(t *testing.T, at string) {
	hello := digest.Of(digest.SHA256, []byte("hello")).String()
	path := write(t, "file", "hello")
	if got, want := ok(t, "put", at, path), hello+"\t"+path+"\n"; got != want {
		t.Errorf("put: %q, want %q", got, want)
	}
	piped := elan(t, "piped", "put", at, "--function=blake3", "-")
	blake := digest.Of(digest.BLAKE3, []byte("piped")).String()
	if piped.out != blake+"\t-\n" {
		t.Errorf("put from the standard input: %+v", piped)
	}
	tree, _, _ := strings.Cut(ok(t, "put", at, filepath.Dir(path)), "\t")

	if got := strings.Count(ok(t, "ls", at), "\n"); got != 3 {
		t.Errorf("ls prints %d lines, want 3", got)
	}
	line := strings.Split(strings.TrimSpace(ok(t, "ls", at, "--function=blake3", "--min_size=2", "--max_size=1KiB", "--newer_than=1h")), "\t")
	if len(line) != 4 || line[0] != blake || line[1] != "5" || line[2] == "0" || !strings.HasPrefix(line[3], "20") {
		t.Errorf("ls --function=blake3: %q", line)
	}
	if got := ok(t, "ls", at, "--older_than=1h"); got != "" {
		t.Errorf("ls of what is old: %q", got)
	}
	var object map[string]any
	if err := json.Unmarshal([]byte(ok(t, "ls", at, "--json", "--function=blake3")), &object); err != nil || object["digest"] != blake || object["size_bytes"] != 5.0 {
		t.Errorf("ls --json: %v, %v", object, err)
	}
	if got := ok(t, "stat", at, "sha256:"+strings.ReplaceAll(hello, "/", "-")); !strings.HasPrefix(got, hello+"\t5\t") {
		t.Errorf("stat: %q", got)
	}
	if got := ok(t, "stat", at, "--as=directory", tree); got != "file: file "+hello+"\n" {
		t.Errorf("stat --as=directory: %q", got)
	}
	if got := ok(t, "get", at, hello); got != "hello" {
		t.Errorf("get: %q", got)
	}
	out := filepath.Join(t.TempDir(), "out")
	ok(t, "get", at, "--tree", tree, out)
	if got, err := os.ReadFile(filepath.Join(out, "file")); err != nil || string(got) != "hello" {
		t.Errorf("get --tree: %q, %v", got, err)
	}
	if got := ok(t, "du", at); !strings.Contains(got, "blobs sha256") || !strings.Contains(got, "blobs within the hour") {
		t.Errorf("du: %s", got)
	}
	if got := ok(t, "du", at, "--json"); strings.Count(got, "\n") != 2 || !strings.Contains(got, `"digest_function":"blake3","from_bytes":0,"from_age_seconds":0,"count":1,"bytes":5`) {
		t.Errorf("du --json: %s", got)
	}
	if got := ok(t, "verify", at, "--rate=1GB"); got != "" {
		t.Errorf("verify: %q", got)
	}
	if got := elan(t, ok(t, "ls", at), "verify", at, "-"); got.status != 0 || got.out+got.errors != "" {
		t.Errorf("verify of what is listed: %+v", got)
	}
	testGone(t, at, hello)
}

// testGone removes a blob and looks at it.
func testGone(t *testing.T, at, gone string) {
	t.Helper()
	ok(t, "rm", at, gone)
	fails(t, 1, gone+" is not there", "rm", at, gone)
	fails(t, 1, gone+" is not there", "stat", at, gone)
	fails(t, 1, "not found", "get", at, gone)
	if r := fails(t, 1, "", "verify", at, gone); !strings.HasPrefix(r.out, "missing\t"+gone+"\t") {
		t.Errorf("verify of what is gone: %+v", r)
	}
	if r := elan(t, "", "verify", at, "-"); r.status != 0 || r.out != "" {
		t.Errorf("verify of an empty list: %+v", r)
	}
}

func TestTools_entries(t *testing.T) {
	dir := t.TempDir()
	addr, stop := serve(t, "127.0.0.1", dir)
	conn, err := client.Dial(t.Context(), addr)
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.New(client.Options{Conn: conn})
	if err != nil {
		t.Fatal(err)
	}
	action := digest.Of(digest.SHA256, []byte("action"))
	for _, instance := range []string{"", "some/instance"} {
		k := blob.EntryKey{Instance: instance, Action: action}
		if err := c.Put(t.Context(), k, &repb.ActionResult{StdoutRaw: []byte("printed")}); err != nil {
			t.Fatal(err)
		}
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	t.Run("server", func(t *testing.T) { testEntries(t, "--remote="+addr, "", action) })
	stop()
	t.Run("storage", func(t *testing.T) { testEntries(t, "--storage=file://"+dir, "some/instance", action) })
}

// testEntries looks at the entry of an instance, and removes it.
func testEntries(t *testing.T, at, instance string, action digest.Digest) {
	listed := ok(t, "ls", at, "--actions")
	if want := "\t" + instanceText(instance) + "\n"; !strings.Contains(listed, action.String()+"\t") || !strings.Contains(listed, want) {
		t.Errorf("ls --actions: %q, want a line with %q", listed, want)
	}
	in := "--instance=" + instance
	if got := ok(t, "stat", at, in, "--actions", action.String()); !strings.HasPrefix(got, action.String()+"\t") {
		t.Errorf("stat --actions: %q", got)
	}
	if got := ok(t, "stat", at, in, "--as=result", action.String()); !strings.Contains(got, "exit_code: 0\nstdout: ") {
		t.Errorf("stat --as=result: %q", got)
	}
	if got := ok(t, "ls", at, "--json", "--actions", in); !strings.Contains(got, `"instance_name":"`+instance+`"`) {
		t.Errorf("ls --json --actions: %q", got)
	}
	ok(t, "rm", at, in, "--actions", action.String())
	fails(t, 1, "is not there", "rm", at, in, "--actions", action.String())
	fails(t, 1, "is not there", "stat", at, in, "--actions", action.String())
}

func TestTools_say_what_is_wrong(t *testing.T) {
	dir := t.TempDir()
	addr, _ := serve(t, "127.0.0.1", dir)
	hash := digest.Of(digest.SHA256, []byte("x")).Hash()
	for _, tc := range []struct {
		name   string
		status int
		args   []string
		want   string
	}{
		{"a store that a server has open", 1, []string{"ls", "--storage=file://" + dir}, "by --remote"},
		{"a server of something else", 1, []string{"ls", "--remote=http://localhost:7780"}, "want HOST:PORT"},
		{"no store", 1, []string{"ls", "--storage=file://" + dir + "/absent"}, "there is no store in"},
		{"a store in memory", 1, []string{"ls", "--storage=mem://"}, "new and empty"},
		{"two stores", 1, []string{"ls", "--storage=file://" + dir, "--remote=" + addr}, "give one of them"},
		{"no server", 1, []string{"ls", "--remote=127.0.0.1:1"}, "is a server running there?"},
		{"no size", 1, []string{"stat", "--remote=" + addr, hash}, "has no size"},
		{"no digest", 2, []string{"rm", "--remote=" + addr}, "elan --help"},
		{"no command", 2, []string{"rn"}, "unexpected argument rn"},
		{"an unknown function", 1, []string{"put", "--remote=" + addr, "--function=md5", "x"}, "want one of"},
		{"an unknown kind", 2, []string{"stat", "--as=blob", hash + "/1"}, "must be one of"},
		{"a tree on the standard output", 2, []string{"get", "--tree", hash + "/1"}, "--tree makes a directory"},
	} {
		t.Run(tc.name, func(t *testing.T) { fails(t, tc.status, tc.want, tc.args...) })
	}
	if _, err := os.Stat(dir + "/absent"); err == nil {
		t.Error("a store was made where there was none")
	}
}

// TestTools_instances: where instances are kept apart, --instance is enough to
// speak of a blob.
func TestTools_instances(t *testing.T) {
	addr, _ := serve(t, "127.0.0.1", t.TempDir(), func(c *serveCmd) { c.IsolateInstances = true })
	at, in := "--remote="+addr, "--instance=one"
	d, _, _ := strings.Cut(ok(t, "put", at, in, write(t, "file", "x")), "\t")
	if got := ok(t, "stat", at, in, d); !strings.HasPrefix(got, d+"@") {
		t.Errorf("stat: %q", got)
	}
	for _, other := range []string{"--instance=two", "--instance="} {
		fails(t, 1, d+" is not there", "stat", at, other, d)
		fails(t, 1, d+" is not there", "rm", at, other, d)
	}
	ok(t, "verify", at, in, d)
	ok(t, "rm", at, in, d)
	fails(t, 1, d+" is not there", "stat", at, in, d)
}

// TestTools_off_loopback: who reaches such a server may not look after it.
func TestTools_off_loopback(t *testing.T) {
	addr, _ := serve(t, "0.0.0.0", t.TempDir())
	_, port, _ := strings.Cut(addr[strings.LastIndexByte(addr, ':'):], ":")
	at := "--remote=127.0.0.1:" + port
	d, _, _ := strings.Cut(ok(t, "put", at, write(t, "file", "x")), "\t")
	fails(t, 1, "unless one starts it with --admin", "ls", at)
	fails(t, 1, "--admin", "rm", at, d)
	if got := ok(t, "get", at, d); got != "x" {
		t.Errorf("get: %q", got)
	}
	// What the API itself tells is told.
	if got := ok(t, "stat", at, d); !strings.HasPrefix(got, d+"\t1\t") {
		t.Errorf("stat: %q", got)
	}
}

func TestTools_verify_finds_corruption(t *testing.T) {
	dir := t.TempDir()
	at := "--storage=file://" + dir
	d, _, _ := strings.Cut(ok(t, "put", at, write(t, "file", strings.Repeat("sound", 100_000))), "\t")
	damage(t, dir)
	r := elan(t, "", "verify", at)
	if r.status != 1 || !strings.HasPrefix(r.out, "corrupt\t"+d+"\t") || strings.Count(r.out, "\n") != 1 {
		t.Errorf("verify: %+v, want %s to be corrupt", r, d)
	}
	if r := elan(t, "", "verify", at); r.status != 0 || r.out != "" {
		t.Errorf("verify again: %+v, want nothing, since it is set aside", r)
	}
	fails(t, 1, "is not there", "stat", at, d)
}

// damage changes a byte of each file of blobs, as a disk does: the times stay.
func damage(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(dir, "cas"), func(path string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		if err := os.Chmod(path, 0o600); err != nil { //nolint:gosec // the test's own
			return err
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0) //nolint:gosec // the test's own
		if err != nil {
			return err
		}
		if _, err := f.WriteAt([]byte{'!'}, 1000); err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
		if err := os.Chmod(path, info.Mode()); err != nil { //nolint:gosec // the test's own
			return err
		}
		return os.Chtimes(path, info.ModTime(), info.ModTime())
	})
	if err != nil {
		t.Fatal(err)
	}
}
