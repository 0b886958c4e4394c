//go:build linux

// Package bare runs commands directly on the host: no namespaces, but
// no process that outlives its command, no descriptor that leaks into it, and,
// where the worker is root, its own user for each slot.
//
// Each Runner has one helper process for all its commands: this program, started
// again; see runner/helper for why. So main, and TestMain of each test that runs
// commands, begin with
//
//	if bare.IsHelper() {
//		os.Exit(bare.HelperMain())
//	}
//
// It needs Linux, with /proc.
package bare

import (
	"log/slog"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
)

// Options say how commands run.
type Options struct {
	// User, if set, is whom commands run as, without supplementary groups. It
	// takes root to set it.
	User User
	// KillTimeout bounds the time to kill what a command leaves behind; where
	// that doesn't do, Run fails. Default 10 s: enough for thousands of
	// processes, too short for one that hangs in the kernel.
	KillTimeout time.Duration
	// Bounds are what commands are held to.
	Bounds helper.Bounds
	// Streams, if set, are those of the one command that the Runner runs.
	Streams *runner.Streams
	// Logger gets what goes wrong with the helper. Default: discard.
	Logger *slog.Logger
}

// User is a user and a group, by number. The zero User is that of the worker.
type User = helper.User

// ErrLeftovers: processes of a command could not be killed.
var ErrLeftovers = helper.ErrLeftovers

// Runner implements runner.Runner. It is used by one goroutine at a time.
type Runner struct{ *helper.Runner }

var _ runner.Runner = (*Runner)(nil)

// helperName is what this program is called when it is not itself.
const helperName = "mettle-bare-helper"

// New starts a Runner.
func New(opts Options) (*Runner, error) {
	r, err := helper.New(helper.Options{
		Name: helperName, User: opts.User, KillTimeout: opts.KillTimeout, Bounds: opts.Bounds, Streams: opts.Streams, Logger: opts.Logger,
	})
	if err != nil {
		return nil, err
	}
	return &Runner{r}, nil
}

// IsHelper reports whether this process was started by this package. If so, all
// that it does is HelperMain.
func IsHelper() bool { return helper.Is(helperName) }

// HelperMain is the main of a process for which IsHelper is true. It returns
// its exit code.
func HelperMain() int { return helper.Main(host{}) }

// host is the helper.Setting of commands that see the host as it is.
type host struct{}

func (host) Enter(string, User) error   { return nil }
func (host) Prepare(*runner.Spec) error { return nil }
func (host) KillAll() bool              { return false }
func (host) OpenDir(path string) (int, error) {
	return unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}
