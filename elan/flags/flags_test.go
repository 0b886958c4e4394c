package flags_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/elan/flags"
)

type commands struct {
	flags.Common
	Echo echoCmd `cmd:"" help:"Copies its input."`
	Fail failCmd `cmd:"" help:"Fails."`
	Port portCmd `cmd:"" help:"Prints a port."`
}

type echoCmd struct {
	MinFree flags.Size `help:"A size." default:"1KiB"`
}

func (c *echoCmd) Run(ctx context.Context, in io.Reader, out io.Writer, log *slog.Logger) error {
	log.InfoContext(ctx, "copying")
	fmt.Fprintln(out, int64(c.MinFree))
	_, err := io.Copy(out, in)
	return err
}

type failCmd struct {
	Status int `arg:"" help:"The exit status."`
}

type portCmd struct {
	Port int `help:"A port." default:"7777"`
}

func (c *portCmd) Run(out io.Writer) error {
	_, err := fmt.Fprintln(out, c.Port)
	return err
}

func (c *failCmd) Run() error {
	if c.Status == 1 {
		return errors.New("it went wrong")
	}
	return fmt.Errorf("wrapped: %w", flags.Exit(c.Status))
}

func TestProgram_Run(t *testing.T) {
	for _, tc := range []struct {
		name   string
		args   []string
		env    string
		status int
		out    string // a part of it
		err    string // a part of it
	}{
		{name: "a command", args: []string{"echo", "--min_free=2KiB"}, out: "2048\ninput"},
		{name: "a variable of the environment", args: []string{"echo"}, env: "3KiB", out: "3072\n"},
		{name: "the log", args: []string{"echo", "--log_format=json"}, err: `"msg":"copying"`},
		{name: "an error", args: []string{"fail", "1"}, status: 1, err: "prog: it went wrong\n"},
		{name: "an exit status of its own", args: []string{"fail", "7"}, status: 7},
		{name: "an unknown flag", args: []string{"echo", "--wrong"}, status: 2, err: "prog: unknown flag --wrong"},
		{name: "a bad size", args: []string{"echo", "--min_free=lots"}, status: 2, err: "want a number of bytes such as 500MB"},
		{name: "an argument that is absent", args: []string{"fail"}, status: 2, err: "prog --help"},
		{name: "a log level that is none", args: []string{"echo", "--log_level=loud"}, status: 2, err: "loud"},
		{name: "help", args: []string{"fail", "--help"}, out: "The exit status."},
		{name: "version", args: []string{"--version"}, out: "1.2.3\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.env != "" {
				t.Setenv("PROG_MIN_FREE", tc.env)
			}
			var out, errs bytes.Buffer
			status := flags.Program{
				Name: "prog", Description: "A program.", Env: "PROG", Version: "1.2.3",
				Stdin: strings.NewReader("input"), Stdout: &out, Stderr: &errs,
			}.Run(&commands{}, tc.args)
			if status != tc.status || !strings.Contains(out.String(), tc.out) || !strings.Contains(errs.String(), tc.err) {
				t.Errorf("exit status %d, want %d; output %q, want %q in it; errors %q, want %q in them", status, tc.status, &out, tc.out, &errs, tc.err)
			}
		})
	}
}

func TestSnakeCase(t *testing.T) {
	for in, want := range map[string]string{"Port": "port", "MinFree": "min_free", "": ""} {
		if got := flags.SnakeCase(in); got != want {
			t.Errorf("SnakeCase(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestListen_names_the_flag(t *testing.T) {
	l, err := flags.Listen(t.Context(), "127.0.0.1", 0, "--port")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := flags.Listen(t.Context(), "127.0.0.1", n, "--http_port"); err == nil || !strings.Contains(err.Error(), "--http_port") {
		t.Errorf("Listen on a port in use: %v, want the flag named", err)
	}
}

// Kubernetes tells each container of every Service, so that one called prog sets
// PROG_PORT to what is no port.
func TestProgram_Run_serviceOfTheSameName(t *testing.T) {
	for _, tc := range []struct {
		name, env string
		args      []string
		status    int
		out       string
	}{
		{name: "no flag", env: "tcp://10.0.0.1:7777", args: []string{"port"}, out: "7777\n"},
		{name: "a flag", env: "udp://10.0.0.1:7777", args: []string{"port", "--port=1"}, out: "1\n"},
		{name: "a port", env: "2", args: []string{"port"}, out: "2\n"},
		{name: "no port", env: "http", args: []string{"port"}, status: flags.ExitUsage},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Setenv("PROG_PORT", tc.env)
			var out, errs bytes.Buffer
			status := flags.Program{Name: "prog", Env: "PROG", Stdout: &out, Stderr: &errs}.Run(&commands{}, tc.args)
			if status != tc.status || out.String() != tc.out {
				t.Errorf("exit status %d, output %q, want %d and %q; errors: %s", status, &out, tc.status, tc.out, &errs)
			}
		})
	}
}
