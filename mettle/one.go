package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/image"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// oneCmd runs one action in the foreground, for somebody who wants to know why
// it fails. It stores nothing and asks no cache.
type oneCmd struct {
	Action   string `arg:"" help:"The digest of the Action, hash/size, as in the message of a failed build."`
	Remote   string `help:"The server that has the action and its inputs, host:port or grpc://host:port." default:"localhost:7778" aliases:"storage"`
	Instance string `help:"The instance name that the build used."`
	flags.Caller
	Kept bool `help:"Run nothing: show what the server kept of the run that failed, its exit code, output and files." env:"-"`
	sandboxFlags
	imageFlags
	Dir string `help:"Where to build the input root and run. Default: a new temporary directory. What is left there stays, to be looked at." type:"path" env:"-"`
}

// Run ends with the action's own exit status.
func (c *oneCmd) Run(ctx context.Context, out io.Writer, log *slog.Logger) (err error) {
	d, err := digest.Parse(c.Action)
	if err != nil {
		return err
	}
	addr, opts, err := c.Dial(c.Remote, log)
	if err != nil {
		return fmt.Errorf("--remote: %w", err)
	}
	conn, err := client.Dial(ctx, addr, opts...)
	if err != nil {
		return fmt.Errorf("%w (is a server running there? --remote names another)", err)
	}
	defer conn.Close() //nolint:errcheck // nothing was written
	remote, err := client.New(client.Options{Conn: conn, Instance: c.Instance})
	if err != nil {
		return err
	}
	if c.Kept {
		return c.showKept(ctx, out, remote, d)
	}
	dir, err := c.directory()
	if err != nil {
		return err
	}
	images, err := c.openImagesForOne(log)
	if err != nil {
		return err
	}
	if images != nil {
		defer func() { err = errors.Join(err, images.Close()) }()
	}
	resp, root, err := worker.One(ctx,
		c.options(worker.Options{
			Store: readOnly{remote}, Dir: dir, Name: "mettle one", Images: images, Logger: log,
			AllowNetwork: true, // of the one action that somebody wants to see
			Hide:         secretFiles(c.TLSKey, c.TokenFile, c.ImageAuth),
		}),
		&queuepb.Job{InstanceName: c.Instance, ActionDigest: d.String()})
	if err != nil {
		if c.Dir == "" && root == "" {
			_ = os.RemoveAll(dir) // nothing ran there
		}
		return fmt.Errorf("run action %s: %w", d, err)
	}
	return c.report(out, resp, root)
}

// openImagesForOne opens a cache of images that is kept from one time to the next,
// apart from those of servers: in --dir, if that is set.
func (c *oneCmd) openImagesForOne(log *slog.Logger) (*image.Cache, error) {
	dir := c.Dir
	if dir == "" {
		var err error
		if dir, err = flags.CacheDir("mettle-one", "--dir"); err != nil {
			return nil, err
		}
	}
	images, err := c.openImages(imageOptions{dir: imagesIn(dir), sandbox: c.Sandbox, log: log})
	if err != nil && c.Images == "auto" {
		log.Warn("no container images can be had", "error", err)
		err = nil
	}
	return images, err
}

func (c *oneCmd) directory() (string, error) {
	if c.Dir != "" {
		return filepath.Abs(c.Dir)
	}
	dir, err := os.MkdirTemp("", "mettle-one-")
	if err != nil {
		return "", err
	}
	// Where root runs this, the action is another user, who must get in.
	return dir, os.Chmod(dir, 0o755) //nolint:gosec // it holds inputs of a build, as readable as the server's
}

// report prints what the command printed, where its files are, and what became
// of it.
func (c *oneCmd) report(out io.Writer, resp *repb.ExecuteResponse, root string) error {
	for _, stream := range []struct {
		name string
		to   io.Writer
	}{{"stdout", out}, {"stderr", os.Stderr}} {
		if err := copyFile(stream.to, filepath.Join(filepath.Dir(root), stream.name)); err != nil {
			return err
		}
	}
	result := resp.GetResult()
	fmt.Fprintf(os.Stderr, "mettle: the input root, as the action left it, is %s\n", root)
	if s := resp.GetStatus(); s.GetCode() != 0 {
		listOutputs(result)
		return errors.New(why(resp))
	}
	return reportResult(result)
}

// why says what kept an action from its end: the status, and the note that its worker
// made, as that of a timeout, whose status says the same for all.
func why(resp *repb.ExecuteResponse) string {
	status := resp.GetStatus().GetMessage()
	// The last line of the message tells where it ran.
	if note, _, noted := strings.Cut(resp.GetMessage(), "\n"); noted {
		status += ": " + note
	}
	return status
}

// reportResult prints what the command made and how it ended, and returns that.
func reportResult(result *repb.ActionResult) error {
	listOutputs(result)
	fmt.Fprintf(os.Stderr, "mettle: the command ended with %d\n", result.GetExitCode())
	if code := result.GetExitCode(); code != 0 {
		return flags.Exit(code)
	}
	return nil
}

func listOutputs(result *repb.ActionResult) {
	for _, f := range result.GetOutputFiles() {
		fmt.Fprintf(os.Stderr, "mettle: output file %s, %d bytes\n", f.GetPath(), f.GetDigest().GetSizeBytes())
	}
	for _, f := range result.GetOutputDirectories() {
		fmt.Fprintf(os.Stderr, "mettle: output directory %s\n", f.GetPath())
	}
	for _, f := range result.GetOutputSymlinks() {
		fmt.Fprintf(os.Stderr, "mettle: output symlink %s to %s\n", f.GetPath(), f.GetTarget())
	}
}

func copyFile(to io.Writer, path string) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil // the command was not started
	}
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // opened for reading
	_, err = io.Copy(to, f)
	return err
}

// readOnly is another store as long as one reads, and throws away what it is to
// take in.
type readOnly struct{ blob.Store }

// Create implements blob.Creator.
func (readOnly) Create(context.Context, digest.Digest) (blob.Writer, error) { return discard{}, nil }

// discard is the Writer of readOnly.
type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }
func (discard) Commit() error               { return nil }
func (discard) Close() error                { return nil }
