//go:build linux

package persistent

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	persistentpb "github.com/mettle-build/mettle/proto/persistent"
)

func TestOf(t *testing.T) {
	usual := []string{"java", "-jar", "x.jar", "@flags"}
	for _, tc := range []struct {
		name     string
		platform string // name=value, separated by spaces
		args     []string
		want     *Tool
		plain    string // what the error says
	}{
		{name: "nothing"},
		{name: "other properties", platform: "OSFamily=linux recycle-runner=true"},
		{name: "a key", platform: "persistentWorkerKey=k", want: &Tool{Key: "k", Protocol: Proto}},
		{name: "an empty key", platform: "persistentWorkerKey="},
		{name: "a protocol alone", platform: "persistentWorkerProtocol=json"},
		{name: "json", platform: "persistentWorkerKey=k persistentWorkerProtocol=json", want: &Tool{Key: "k", Protocol: JSON}},
		{name: "proto", platform: "persistentWorkerKey=k persistentWorkerProtocol=proto requires-worker-protocol=json", want: &Tool{Key: "k", Protocol: Proto}},
		{name: "by execution requirements", platform: "supports-workers=1 requires-worker-protocol=json", want: &Tool{Protocol: JSON}},
		{name: "not by execution requirements", platform: "supports-workers=0"},
		{name: "by a flag", platform: "persistent-workers=True", want: &Tool{Protocol: Proto}},
		{name: "another protocol", platform: "persistentWorkerKey=k persistentWorkerProtocol=xml", plain: `worker protocol "xml"`},
		{name: "no flag file", platform: "persistentWorkerKey=k", args: []string{"java", "@", "--flagfile="}, plain: "nothing to ask for"},
		{name: "flag files alone", platform: "persistentWorkerKey=k", args: []string{"@a", "@b"}, plain: "no arguments but flag files"},
		{
			name: "flag files of all kinds", platform: "persistentWorkerKey=k", args: []string{"java", "@a", "-O", "--flagfile=b", "-flagfile=c", "@@d", "e@f", "--flagfiles=g"},
			want: &Tool{Key: "k", Protocol: Proto, Startup: []string{"java", "-O", "e@f", "--flagfiles=g", "--persistent_worker"}, FlagFiles: []string{"@a", "--flagfile=b", "-flagfile=c", "@@d"}},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := &repb.Platform{}
			for s := range strings.FieldsSeq(tc.platform) {
				name, value, _ := strings.Cut(s, "=")
				p.Properties = append(p.Properties, &repb.Platform_Property{Name: name, Value: value})
			}
			if tc.args == nil {
				tc.args = usual
			}
			if tc.want != nil && tc.want.Startup == nil {
				tc.want.Startup, tc.want.FlagFiles = []string{"java", "-jar", "x.jar", "--persistent_worker"}, []string{"@flags"}
			}
			got, err := Of(p, &repb.Command{Arguments: tc.args})
			if (err != nil) != (tc.plain != "") || err != nil && (!errors.Is(err, ErrPlain) || !strings.Contains(err.Error(), tc.plain)) {
				t.Fatalf("error %v, want one that says %q", err, tc.plain)
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("tool (-want +got):\n%s", d)
			}
		})
	}
}

func TestExpand(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"a":         "-x\n@sub/b\n\n@@c\r\n@repo//pkg:target\n--flagfile=sub/b\nlast",
		"sub/b":     "b1\nb 2\n",
		"sub/wd":    "@b\n@../sub/b\n",
		"empty":     "",
		"newline":   "\n",
		"circle":    "@circle\n",
		"nonutf8":   "\xff\n",
		"nonutf8_2": "@a\xff\n",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(root, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{"link": "sub/b", "out": "/etc/hostname", "up": "../x"} {
		if err := os.Symlink(to, filepath.Join(root, from)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name, wd string
		args     []string
		want     []string
		fails    bool
	}{
		{name: "Bazel's rules", args: []string{"@a"}, want: []string{"-x", "b1", "b 2", "", "@@c", "@repo//pkg:target", "--flagfile=sub/b", "last"}},
		{name: "several", args: []string{"--flagfile=a", "@sub/b", "@empty", "@newline"}, want: []string{"--flagfile=a", "b1", "b 2", ""}},
		{name: "in a working directory", wd: "sub", args: []string{"@wd"}, want: []string{"b1", "b 2", "b1", "b 2"}},
		{name: "by a symlink", args: []string{"@link"}, want: []string{"b1", "b 2"}},
		{name: "absent", args: []string{"@nowhere"}, fails: true},
		{name: "a FIFO", args: []string{"@fifo"}, fails: true},
		{name: "a directory", args: []string{"@sub"}, fails: true},
		{name: "absolute", args: []string{"@/etc/hostname"}, fails: true},
		{name: "by a symlink that leads out", args: []string{"@out"}, fails: true},
		{name: "by another", args: []string{"@up"}, fails: true},
		{name: "above", args: []string{"@../x"}, fails: true},
		{name: "a circle", args: []string{"@circle"}, fails: true},
		{name: "not UTF-8", args: []string{"@nonutf8"}, fails: true},
		{name: "a name that is not", args: []string{"@nonutf8_2"}, fails: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := expand(root, tc.wd, tc.args)
			if (err != nil) != tc.fails {
				t.Fatalf("error %v", err)
			}
			if d := cmp.Diff(tc.want, got); !tc.fails && d != "" {
				t.Errorf("arguments (-want +got):\n%s", d)
			}
		})
	}
}

// The bytes on the wire are those that Bazel's tools read.
func TestEncode(t *testing.T) {
	req := &persistentpb.WorkRequest{Arguments: []string{"-a", "b"}, Inputs: []*persistentpb.Input{{Path: "p", Digest: []byte("ab")}}}
	got, err := encode(Proto, req)
	if want := "\x10\x0a\x02-a\x0a\x01b\x12\x07\x0a\x01p\x12\x02ab"; err != nil || string(got) != want {
		t.Errorf("proto: %q, %v, want %q", got, err, want)
	}
	if got, err = encode(JSON, req); err != nil || bytes.Count(got, []byte("\n")) != 1 || got[len(got)-1] != '\n' {
		t.Errorf("json: %q, %v, want one line", got, err)
	}
	var fields map[string]any
	if err := json.Unmarshal(got, &fields); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"arguments": []any{"-a", "b"}, "inputs": []any{map[string]any{"path": "p", "digest": "YWI="}}}
	if d := cmp.Diff(want, fields); d != "" {
		t.Errorf("json (-want +got):\n%s", d)
	}
	if _, err := encode(Proto, &persistentpb.WorkRequest{Arguments: []string{"\xff"}}); err == nil {
		t.Error("what is not UTF-8 is sent")
	}
}

func TestResponses(t *testing.T) {
	r := newResponses(strings.NewReader(`{"exitCode": 1, "output": "a\nb", "unknown": {}} {"exit_code":2}`+"\n\n{}\n[]"), JSON, 100)
	for _, want := range []*persistentpb.WorkResponse{{ExitCode: 1, Output: "a\nb"}, {ExitCode: 2}, {}} {
		got, err := r.read()
		if d := cmp.Diff(want, got, protocmp.Transform()); err != nil || d != "" {
			t.Errorf("error %v, (-want +got):\n%s", err, d)
		}
	}
	if got, err := r.read(); err == nil {
		t.Errorf("a list is response %v", got)
	}
	// Some tools tell of an exit code below 0.
	data, err := proto.Marshal(&persistentpb.WorkResponse{ExitCode: -1, Output: "x"})
	if err != nil {
		t.Fatal(err)
	}
	r = newResponses(bytes.NewReader(append(binary.AppendUvarint(nil, uint64(len(data))), data...)), Proto, 100)
	if got, err := r.read(); err != nil || got.ExitCode != -1 || got.Output != "x" {
		t.Errorf("response %v, %v", got, err)
	}
	if _, err := r.read(); !errors.Is(err, errEnded) {
		t.Errorf("error %v at the end", err)
	}
}

// Whatever a tool writes, it is read within bounds, and what is taken for a response
// was one.
func FuzzResponses(f *testing.F) {
	one, err := encodeResponse(&persistentpb.WorkResponse{ExitCode: 1, Output: "out"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(one, false)
	f.Add(append(one, one...), false)
	f.Add([]byte("Hello, world!\n"), false)
	f.Add([]byte("\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01x"), false)
	f.Add([]byte(`{"exitCode":1,"output":"x","requestId":0}`+"\n{}"), true)
	f.Add([]byte(`{"output":"\u0000`), true)
	f.Add([]byte(strings.Repeat("[", 20_000)), true)
	f.Fuzz(func(t *testing.T, data []byte, json bool) {
		protocol := Proto
		if json {
			protocol = JSON
		}
		const limit = 1000
		r := newResponses(bytes.NewReader(data), protocol, limit)
		for range len(data) + 1 {
			resp, err := r.read()
			if len(r.seen()) > maxFirst || r.from.n > limit+2*4096 {
				t.Fatalf("%d bytes read, %d kept", r.from.n, len(r.seen()))
			}
			if err != nil {
				return
			}
			if resp.GetRequestId() != 0 || resp.GetWasCancelled() || len(resp.GetOutput()) > limit+2*4096 {
				t.Fatalf("response %v", resp)
			}
			_ = r.quiet()
		}
	})
}

func encodeResponse(m *persistentpb.WorkResponse) ([]byte, error) {
	data, err := proto.Marshal(m)
	return append(binary.AppendUvarint(nil, uint64(len(data))), data...), err
}

// Whatever flag files say, they are read within the root and within bounds.
func FuzzExpand(f *testing.F) {
	f.Add("@a", "x\n@b\n", "y\r\n@@z\n\n@r//x")
	f.Add("@b", "@b\n@b\n", "@a\n@a\n")
	f.Add("@../a", "", "\xff")
	f.Fuzz(func(t *testing.T, arg, a, b string) {
		root := t.TempDir()
		for name, text := range map[string]string{"a": a, "b": b} {
			if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		args, err := expand(root, "", []string{arg})
		if err != nil {
			return
		}
		for _, s := range args {
			if s != arg && !strings.Contains(a+b, s) {
				t.Errorf("argument %q is from neither file", s)
			}
		}
	})
}
