//go:build linux

package persistent_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/mettle-build/mettle/mettle/worker/runner/bare"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

func TestMain(m *testing.M) {
	if bare.IsHelper() {
		os.Exit(bare.HelperMain())
	}
	if sandbox.IsHelper() {
		os.Exit(sandbox.HelperMain())
	}
	if os.Getenv(toolEnv) != "" {
		os.Exit(toolMain())
	}
	_ = os.Setenv("GORACE", "atexit_sleep_ms=0") // or each process takes a second to end
	os.Exit(testMain(m))
}

// testMain runs the tests with one store, of which making the tool a blob is what
// takes long.
func testMain(m *testing.M) (code int) {
	complain := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = max(code, 1)
		}
	}
	var remove func() error
	var err error
	if shared, remove, err = newShared(); err != nil {
		complain(err)
		return code
	}
	code = m.Run()
	complain(remove())
	if code == 0 {
		complain(goleak.Find())
	}
	return code
}

// toolEnv says that this process is the tool: the test's own program, as an input
// file. Its value is the protocol.
const toolEnv = "PERSISTENT_TEST_TOOL"

// tool is what a compiler would be. What it is asked is a list of steps; see step. It
// has a protocol reader of its own, by the public description.
type tool struct {
	protocol string
	in       *bufio.Reader
	answered int
	request  toolRequest
	answer   toolAnswer
	silent   bool
	after    func()
}

type toolRequest struct {
	Arguments []string
	Inputs    []struct {
		Path   string
		Digest []byte
	}
	RequestID int `json:"requestId"`
}

type toolAnswer struct {
	ExitCode     int    `json:"exitCode"`
	Output       string `json:"output"`
	RequestID    int    `json:"requestId"`
	WasCancelled bool   `json:"wasCancelled,omitempty"`
	Unknown      string `json:"unknown,omitempty"`
}

func toolMain() int {
	if d, err := time.ParseDuration(os.Getenv("TOOL_BOOT")); err == nil {
		time.Sleep(d)
	}
	t := &tool{protocol: os.Getenv(toolEnv), in: bufio.NewReader(os.Stdin)}
	if !slices.Contains(os.Args, "--persistent_worker") {
		return t.once()
	}
	if slices.Contains(os.Args, "--never") {
		fmt.Fprintln(os.Stderr, "unknown flag --persistent_worker")
		return 2
	}
	if slices.Contains(os.Args, "--deaf") {
		t.write()
		select {}
	}
	for {
		if err := t.read(); errors.Is(err, io.EOF) {
			return 0
		} else if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		t.answer, t.silent, t.after = toolAnswer{RequestID: t.request.RequestID}, false, func() {}
		t.steps(t.request.Arguments)
		if !t.silent {
			t.write()
		}
		t.after()
		t.answered++
	}
}

// once is the tool as a plain command.
func (t *tool) once() int {
	for _, a := range os.Args[1:] {
		if name, ok := strings.CutPrefix(a, "@"); ok {
			data, err := os.ReadFile(name)
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			t.steps(strings.Split(strings.TrimSuffix(string(data), "\n"), "\n"))
		}
	}
	fmt.Fprint(os.Stderr, t.answer.Output)
	return t.answer.ExitCode
}

func (t *tool) steps(steps []string) {
	for _, s := range steps {
		if err := t.step(strings.Split(s, ":")); err != nil {
			t.answer.ExitCode, t.answer.Output = 70, fmt.Sprintf("%s: %v\n", s, err)
			return
		}
	}
}

func (t *tool) step(s []string) error {
	arg := func(i int) string { return strings.Join(s[min(i, len(s)):], ":") }
	switch s[0] {
	case "":
	case "write": // FILE TEXT
		return os.WriteFile(s[1], []byte(arg(2)), 0o644)
	case "copy": // FROM TO
		data, err := os.ReadFile(s[1])
		if err != nil {
			return err
		}
		return os.WriteFile(s[2], data, 0o644)
	case "args", "inputs", "count", "pid", "ls": // FILE
		return os.WriteFile(s[1], []byte(t.tell(s[0])), 0o644)
	case "say":
		t.answer.Output += arg(1) + "\n"
	case "log":
		fmt.Fprintln(os.Stderr, arg(1))
	case "exit":
		t.answer.ExitCode, _ = strconv.Atoi(s[1])
	case "remove":
		return os.RemoveAll(s[1])
	case "replace": // FILE, by an equal one
		data, err := os.ReadFile(s[1])
		return errors.Join(err, os.Remove(s[1]), os.WriteFile(s[1], data, 0o755))
	case "mode":
		mode, _ := strconv.ParseUint(s[2], 8, 32)
		return os.Chmod(s[1], fs.FileMode(mode))
	case "link": // TARGET FILE
		return os.Symlink(s[1], s[2])
	case "fifo":
		return syscall.Mkfifo(s[1], 0o644)
	case "mkdir":
		return os.Mkdir(s[1], 0o755)
	default:
		return t.misbehave(s, arg(1))
	}
	return nil
}

// misbehave does what a tool should not. As a plain command it has nobody to do it to.
func (t *tool) misbehave(s []string, rest string) error {
	if t.protocol == "" || !slices.Contains(os.Args, "--persistent_worker") {
		return nil
	}
	switch s[0] {
	case "die":
		os.Exit(3)
	case "die-if-reused":
		if t.answered > 0 {
			os.Exit(3)
		}
	case "kill":
		return syscall.Kill(os.Getpid(), syscall.SIGKILL)
	case "print": // anything to stdout
		fmt.Print(rest)
	case "bytes": // the same in hexadecimal
		data, err := hex.DecodeString(rest)
		_, _ = os.Stdout.Write(data)
		return err
	case "hang":
		select {}
	case "silent":
		t.silent = true
	case "close":
		t.silent = true
		_ = os.Stdout.Close()
	case "id":
		t.answer.RequestID, _ = strconv.Atoi(s[1])
	case "cancelled":
		t.answer.WasCancelled = true
	case "big":
		n, _ := strconv.Atoi(s[1])
		t.answer.Output = strings.Repeat("x", n)
	case "unknown":
		t.answer.Unknown = "a field of later"
	case "after-print":
		t.after = func() { fmt.Print(rest) }
	case "after-die":
		t.after = func() { os.Exit(4) }
	case "write-on": // for ever
		begun := make(chan struct{})
		go func() {
			for i := 0; ; i++ {
				_ = os.WriteFile(fmt.Sprint("extra", i%1000), nil, 0o644)
				if i == 10 {
					close(begun)
				}
			}
		}()
		<-begun
	case "daemon":
		cmd := exec.CommandContext(context.Background(), "/bin/sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000")
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		return cmd.Start()
	default:
		return fmt.Errorf("no such step")
	}
	return nil
}

func (t *tool) tell(what string) string {
	var b strings.Builder
	switch what {
	case "args":
		for _, a := range t.request.Arguments {
			fmt.Fprintln(&b, a)
		}
	case "inputs":
		for _, i := range t.request.Inputs {
			fmt.Fprintf(&b, "%s %s\n", i.Path, i.Digest)
		}
	case "count":
		fmt.Fprint(&b, t.answered)
	case "pid":
		fmt.Fprint(&b, os.Getpid())
	case "ls":
		_ = filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
			fmt.Fprintln(&b, p)
			return err
		})
	}
	return b.String()
}

func (t *tool) read() error {
	t.request = toolRequest{}
	if t.protocol == "json" {
		line, err := t.in.ReadBytes('\n')
		if err != nil {
			return err
		}
		return json.Unmarshal(line, &t.request)
	}
	size, err := binary.ReadUvarint(t.in)
	if err != nil {
		return err
	}
	data := make([]byte, size)
	if _, err := io.ReadFull(t.in, data); err != nil {
		return err
	}
	for len(data) > 0 {
		num, typ, n := protowire.ConsumeTag(data)
		if n < 0 {
			return protowire.ParseError(n)
		}
		data = data[n:]
		switch {
		case num == 1 && typ == protowire.BytesType:
			v, n := protowire.ConsumeString(data)
			t.request.Arguments, data = append(t.request.Arguments, v), data[n:]
		case num == 2 && typ == protowire.BytesType:
			v, n := protowire.ConsumeBytes(data)
			data = data[n:]
			t.input(v)
		default:
			data = data[protowire.ConsumeFieldValue(num, typ, data):]
		}
	}
	return nil
}

func (t *tool) input(data []byte) {
	t.request.Inputs = append(t.request.Inputs, struct {
		Path   string
		Digest []byte
	}{})
	in := &t.request.Inputs[len(t.request.Inputs)-1]
	for len(data) > 0 {
		num, _, n := protowire.ConsumeTag(data)
		v, m := protowire.ConsumeBytes(data[n:])
		if num == 1 {
			in.Path = string(v)
		} else {
			in.Digest = bytes.Clone(v)
		}
		data = data[n+m:]
	}
}

func (t *tool) write() {
	if t.protocol == "json" {
		data, _ := json.MarshalIndent(t.answer, "", " ") // Bazel takes it on several lines
		_, _ = os.Stdout.Write(append(data, '\n'))
		return
	}
	var m []byte
	m = protowire.AppendVarint(protowire.AppendTag(m, 1, protowire.VarintType), uint64(int64(t.answer.ExitCode)))
	m = protowire.AppendString(protowire.AppendTag(m, 2, protowire.BytesType), t.answer.Output)
	m = protowire.AppendVarint(protowire.AppendTag(m, 3, protowire.VarintType), uint64(int64(t.answer.RequestID)))
	if t.answer.WasCancelled {
		m = protowire.AppendVarint(protowire.AppendTag(m, 4, protowire.VarintType), 1)
	}
	if t.answer.Unknown != "" {
		m = protowire.AppendString(protowire.AppendTag(m, 99, protowire.BytesType), t.answer.Unknown)
	}
	_, _ = os.Stdout.Write(protowire.AppendBytes(nil, m))
}
