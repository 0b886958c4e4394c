// Package flags is the command line that elan and mettle have in common: how
// flags are named (snake_case, as with Bazel and Please, each with an
// environment variable), the flags of every command, numbers of bytes, where
// things are kept by default, and the exit status. The two mains alone use it;
// their commands and what these do are their own.
//
//	var c struct {
//		flags.Common
//		Serve serveCmd `cmd:"" help:"Serve a store."`
//	}
//	p := flags.Program{Name: "elan", Env: "ELAN", Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
//	os.Exit(p.Run(&c, os.Args[1:]))
package flags

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/alecthomas/kong"

	"github.com/mettle-build/mettle/metrics"
)

// The exit statuses. A command may end with others, by returning an Exit.
const (
	ExitFailed = 1 // what was asked for did not succeed
	ExitUsage  = 2 // the command line makes no sense
)

// Common are the flags of every command, for a command line to embed.
type Common struct {
	LogFormat string           `help:"How to log: text or json." enum:"text,json" default:"text"`
	LogLevel  string           `help:"The least level that is logged: debug, info, warn or error." default:"info"`
	Version   kong.VersionFlag `help:"Print the version and exit." env:"-"`
}

func (c *Common) common() *Common { return c }

// Commands is a pointer to the struct of a command line, which embeds Common.
type Commands interface{ common() *Common }

// Program is a program with commands.
type Program struct {
	Name        string // as it is called
	Description string // a sentence or two
	Env         string // what the names of the environment variables begin with
	Version     string
	// LogFields is what log lines tell by their context, beside what they tell of
	// calls. nil: nothing.
	LogFields func(context.Context) []slog.Attr
	Vars      map[string]string // ${name} in the tags of flags stands for its value

	Stdin          io.Reader
	Stdout, Stderr io.Writer
}

// Run parses args into c, and calls the Run method of the command that they
// name, which may take a context.Context, the standard input as an io.Reader,
// the standard output as an io.Writer, and a *slog.Logger. The context ends at
// the first SIGINT or SIGTERM; a second one ends the process, unless the command
// has asked for signals itself. Run returns the exit status, after printing the
// error to Stderr.
func (p Program) Run(c Commands, args []string) int {
	status := -1
	// After --help and --version, which leave the parser running.
	parser, err := p.Parser(c, func(code int) {
		if status < 0 {
			status = code
		}
	})
	if err != nil {
		return p.fail(err, ExitFailed)
	}
	kctx, err := parser.Parse(args)
	if status >= 0 {
		return status
	}
	if err != nil {
		return p.fail(err, ExitUsage)
	}
	common := c.common()
	var fields []func(context.Context) []slog.Attr
	if p.LogFields != nil {
		fields = append(fields, p.LogFields)
	}
	log, err := metrics.NewLogger(p.Stderr, common.LogFormat, common.LogLevel, fields...)
	if err != nil {
		return p.fail(err, ExitUsage)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	kctx.BindTo(ctx, (*context.Context)(nil))
	kctx.BindTo(p.Stdin, (*io.Reader)(nil))
	kctx.BindTo(p.Stdout, (*io.Writer)(nil))
	return p.status(kctx.Run(log))
}

// Parser parses command lines into c. It calls exit after --help and --version,
// and goes on when that returns.
func (p Program) Parser(c Commands, exit func(code int)) (*kong.Kong, error) {
	return kong.New(
		c,
		kong.Name(p.Name),
		kong.Description(p.Description),
		kong.ShortUsageOnError(),
		kong.FlagNamer(SnakeCase),
		kong.DefaultEnvars(p.Env),
		kong.PostBuild(withoutLinks),
		kong.Vars{"version": p.Version},
		kong.Vars(p.Vars),
		kong.Writers(p.Stdout, p.Stderr),
		kong.Exit(exit),
	)
}

// withoutLinks has the parser overlook variables that Kubernetes sets in every
// container: with a Service called elan, ELAN_PORT=tcp://10.0.0.1:7777.
func withoutLinks(k *kong.Kong) error {
	return kong.Visit(k.Model, func(node kong.Visitable, next kong.Next) error {
		if f, ok := node.(*kong.Flag); ok {
			f.Tag.Envs = slices.DeleteFunc(slices.Clone(f.Tag.Envs), isLink)
		}
		return next(nil)
	})
}

// isLink tells whether an environment variable has the address of a Service.
func isLink(name string) bool {
	scheme, _, ok := strings.Cut(os.Getenv(name), "://")
	return ok && strings.HasSuffix(name, "_PORT") && slices.Contains([]string{"tcp", "udp", "sctp"}, scheme)
}

// status is the exit status that err stands for.
func (p Program) status(err error) int {
	if err == nil {
		return 0
	}
	if exit, ok := errors.AsType[Exit](err); ok {
		return int(exit)
	}
	return p.fail(err, ExitFailed)
}

func (p Program) fail(err error, status int) int {
	fmt.Fprintf(p.Stderr, "%s: %s\n", p.Name, Plain(err.Error()))
	if status == ExitUsage {
		fmt.Fprintf(p.Stderr, "Run \"%s --help\" for what there is.\n", p.Name)
	}
	return status
}

// Exit is the exit status of a command that has said for itself what went wrong.
type Exit int

// Error implements error.
func (e Exit) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// SnakeCase makes of MinFree the flag min_free. Names with initials say theirs
// in a tag.
func SnakeCase(field string) string {
	var b strings.Builder
	for i, r := range field {
		if i > 0 && r >= 'A' && r <= 'Z' {
			b.WriteByte('_')
		}
		b.WriteRune(r)
	}
	return strings.ToLower(b.String())
}

// Listen listens on a port of host. Where another port would do, the error names
// the flag by which to choose it. The caller closes the listener.
func Listen(ctx context.Context, host string, port int, flag string) (net.Listener, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	if errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, syscall.EACCES) {
		return nil, fmt.Errorf("%w (choose another port with %s)", err, flag)
	}
	return l, err
}

// CacheDir is where a program of that name keeps what it keeps, where nobody
// says: below /var/cache for root, which the users that actions run as can
// enter, and in the user's cache directory for others. Flag is the one that
// says it.
func CacheDir(name, flag string) (string, error) {
	if os.Geteuid() == 0 {
		return filepath.Join("/var/cache", name), nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no cache directory, give %s: %w", flag, err)
	}
	return filepath.Join(cache, name), nil
}
