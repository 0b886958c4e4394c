package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/mettle-build/mettle/mettle/bench"
)

// benchFleet starts the processes of `mettle bench fleet`: noopCmd, each.
type benchFleet struct {
	queue   string
	workers int
}

// start starts API servers, and the workers: in the one server where the queue
// is in its memory, and otherwise in a process of their own.
func (f benchFleet) start(ctx context.Context, servers int) (*bench.RunningFleet, error) {
	fleet := &bench.RunningFleet{Workers: strconv.Itoa(f.workers) + " workers"}
	var children []*child
	fleet.Stop = func() error {
		var errs []error
		for _, c := range children {
			errs = append(errs, c.stop())
		}
		return errors.Join(errs...)
	}
	begin := func(args ...string) (*child, error) {
		c, err := startChild(ctx, args)
		if err != nil {
			return nil, errors.Join(err, fleet.Stop())
		}
		children = append(children, c)
		return c, nil
	}
	for range servers {
		args := []string{"noop", "--serve"}
		if f.queue == "" {
			args = append(args, "--workers", strconv.Itoa(f.workers))
		} else {
			args = append(args, "--queue", f.queue)
		}
		c, err := begin(args...)
		if err != nil {
			return nil, err
		}
		fleet.Remotes = append(fleet.Remotes, "grpc://"+c.said)
		fleet.PIDs = append(fleet.PIDs, c.cmd.Process.Pid)
	}
	if f.queue != "" {
		if _, err := begin("noop", "--queue", f.queue, "--workers", strconv.Itoa(f.workers)); err != nil {
			return nil, err
		}
	}
	return fleet, nil
}

// A child is a process of this program that ends when its input does.
type child struct {
	cmd   *exec.Cmd
	input io.Closer
	said  string // what it said when it had started
}

// childTimeout is how long a child may take to start, and to end.
const childTimeout = 30 * time.Second

// readyPrefix begins the line that a child says when it has started.
const readyPrefix = "ready "

func startChild(ctx context.Context, args []string) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, args...) //nolint:gosec // this program
	cmd.Stderr = os.Stderr
	input, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	late := time.AfterFunc(childTimeout, func() { _ = cmd.Process.Kill() }) // it may have ended
	line, err := bufio.NewReader(output).ReadString('\n')
	late.Stop()
	said, ok := strings.CutPrefix(strings.TrimSpace(line), readyPrefix)
	if err != nil || !ok {
		_ = cmd.Process.Kill()
		return nil, fmt.Errorf("%s did not start: %w", strings.Join(cmd.Args, " "), errors.Join(err, cmd.Wait()))
	}
	return &child{cmd: cmd, input: input, said: said}, nil
}

// stop ends the process and waits for it.
func (c *child) stop() error {
	late := time.AfterFunc(childTimeout, func() { _ = c.cmd.Process.Kill() }) // it may have ended
	defer late.Stop()
	return errors.Join(c.input.Close(), c.cmd.Wait())
}
