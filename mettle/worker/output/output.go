//go:build linux

// Package output takes what a command has left behind into the store: output
// files, directories and symlinks, stdout and stderr, as an ActionResult names
// them.
//
// It runs when no process of the command is alive, and still trusts nothing that
// it finds. Every path is resolved by the kernel beneath the input root, so that
// nothing outside is read whatever symlinks there are; a FIFO, a socket or a
// device is not opened for its contents. Such an output counts as not produced,
// which by the REAPI is no error, and a note says why. Where a process does live, as a
// tool does that is kept running, the store has no Adopter, and what changes while it
// is read is an error.
//
// Where the store is on the local disk, files become blobs without a copy
// (blob.Adopter); where they also have to go to another store (blob.LateAdopter), they
// do so together. Otherwise the store is asked once which of all blobs it lacks,
// and these are uploaded some at a time.
package output

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/command"
)

// ErrUnusable: the command has produced an output that can't be returned as the
// Command asks for it: a directory where output_files has a file, a name that
// is not UTF-8, more files than the limit. The command is at fault.
var ErrUnusable = errors.New("unusable output")

// Options are those of New.
type Options struct {
	// Store takes the outputs.
	Store blob.Store
	// MaxEntries bounds the files, directories and symlinks of all outputs of
	// one action; 0 means 1,000,000, as for input roots.
	MaxEntries int
	// MaxDepth bounds the directories within each other in an output; 0 means
	// 256.
	MaxDepth int
	// MaxTreeBytes bounds a Tree; 0 means 64 MiB, as in the ActionCache.
	MaxTreeBytes int64
	// MaxInlineBytes bounds the stdout and the stderr, each, that are also
	// part of the result itself; 0 means 16 KiB: the messages of a compiler,
	// so that the client of a failed action needs no other call.
	MaxInlineBytes int64
	// MaxUploads bounds the blobs that are written at a time to a store that
	// is not on the local disk; 0 means 8.
	MaxUploads int
}

// Collector takes outputs in. It is safe for concurrent use.
type Collector struct {
	o       Options
	adopter blob.Adopter     // nil: upload
	late    blob.LateAdopter // nil: what is adopted has nowhere else to go
}

// New checks the options and returns a Collector, which needs no closing.
func New(o Options) (*Collector, error) {
	if o.Store == nil {
		return nil, errors.New("outputs: Options need a Store")
	}
	if o.MaxEntries < 0 || o.MaxDepth < 0 || o.MaxTreeBytes < 0 || o.MaxInlineBytes < 0 || o.MaxUploads < 0 {
		return nil, errors.New("outputs: negative limit")
	}
	o.MaxEntries = cmp.Or(o.MaxEntries, 1_000_000)
	o.MaxDepth = cmp.Or(o.MaxDepth, 256)
	o.MaxTreeBytes = cmp.Or(o.MaxTreeBytes, 64<<20)
	o.MaxInlineBytes = cmp.Or(o.MaxInlineBytes, 16<<10)
	o.MaxUploads = cmp.Or(o.MaxUploads, 8)
	c := &Collector{o: o}
	c.adopter, _ = blob.As[blob.Adopter](o.Store)
	if c.adopter != nil {
		c.late, _ = blob.As[blob.LateAdopter](o.Store)
	}
	return c, nil
}

// Request says what to collect.
type Request struct {
	// Root is the absolute path of the input root in which the command ran.
	Root string
	// Command is valid by package command.
	Command *repb.Command
	// Owner is whom the command ran as. Files that this user can't read are
	// not returned.
	Owner Owner
	// Function makes the digests.
	Function digest.Function
	// Stdout and Stderr are files; the sizes are theirs, in bytes. Those of
	// size 0 are not looked at. They may be taken over by the store, so that
	// the caller removes them and never writes to them again.
	Stdout, Stderr           string
	StdoutBytes, StderrBytes int64
}

// Owner is a user and a group, by number. The zero Owner is the worker's own.
type Owner struct {
	Set      bool
	UID, GID int
}

// Collected is what Collect found.
type Collected struct {
	// Result has its outputs, stdout and stderr set. Blobs that it names are
	// in the store.
	Result *repb.ActionResult
	// Notes tell a user about paths that are there and yet not in Result, a
	// sentence each.
	Notes []string
}

// Collect takes the outputs in. An error that wraps ErrUnusable comes with a
// Collected whose Result has all the other outputs; other errors are trouble of
// the store or of this machine.
func (c *Collector) Collect(ctx context.Context, req Request) (*Collected, error) {
	w := &work{c: c, req: &req, got: &Collected{Result: &repb.ActionResult{}}}
	defer w.close()
	for _, p := range req.Command.OutputNodeProperties {
		w.wantMtime = w.wantMtime || p == command.PropertyMtime
		w.wantMode = w.wantMode || p == command.PropertyUnixMode
	}
	if err := w.streams(ctx); err != nil {
		return nil, err
	}
	unusable := w.outputs(ctx)
	if unusable != nil && !errors.Is(unusable, ErrUnusable) {
		return nil, unusable
	}
	if err := w.flush(ctx); err != nil {
		return nil, err
	}
	return w.got, unusable
}

// outputs collects all of them. An unusable one does not keep it from the rest.
func (w *work) outputs(ctx context.Context) error {
	paths, files, directories := command.Outputs(w.req.Command)
	var all error
	for _, l := range []struct {
		paths []string
		want  want
	}{{paths, wantAny}, {files, wantFile}, {directories, wantDirectory}} {
		for _, p := range l.paths {
			err := w.output(ctx, p, l.want)
			if err != nil && !errors.Is(err, ErrUnusable) {
				return fmt.Errorf("output %q: %w", p, err)
			}
			if err != nil && all == nil {
				all = fmt.Errorf("output %q: %w", p, err)
			}
		}
	}
	return all
}

// want says which field of the Command named an output.
type want uint8

const (
	wantAny want = iota
	wantFile
	wantDirectory
)

// output collects one output by what it is.
func (w *work) output(ctx context.Context, path string, want want) error {
	if err := w.openRoot(); err != nil {
		return err
	}
	rel := command.OutputPath(w.req.Command, path)
	fd, st, err := w.root.open(rel)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return nil
	case errors.Is(err, unix.ELOOP):
		return w.outputSymlink(path, rel, want)
	case errors.Is(err, unix.EXDEV):
		w.note("output %q is not returned: it lies behind a symlink that leads out of the input root", path)
		return nil
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		w.note("output %q is not returned: it can't be read: %v", path, err)
		return nil
	case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		w.note("output %q is not returned: it is a socket or a device", path)
		return nil
	case err != nil:
		return &os.PathError{Op: "open", Path: rel, Err: err}
	}
	if w.foreign(&st) {
		unix.Close(fd) //nolint:errcheck // opened for reading
		w.note("output %q is not returned: it belongs to somebody else, and the command can't read it", path)
		return nil
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if want == wantDirectory {
			unix.Close(fd) //nolint:errcheck // opened for reading
			return fmt.Errorf("%w: output_directories has it, but it is a file", ErrUnusable)
		}
		return w.outputFile(ctx, path, rel, fd, &st)
	case unix.S_IFDIR:
		if want == wantFile {
			unix.Close(fd) //nolint:errcheck // opened for reading
			return fmt.Errorf("%w: output_files has it, but it is a directory", ErrUnusable)
		}
		return w.outputDirectory(ctx, path, rel, fd)
	}
	unix.Close(fd) //nolint:errcheck // opened for reading
	w.note("output %q is not returned: it is a FIFO, a socket or a device", path)
	return nil
}

func (w *work) outputFile(ctx context.Context, path, rel string, fd int, st *unix.Stat_t) error {
	if err := w.count(1); err != nil {
		unix.Close(fd) //nolint:errcheck // opened for reading
		return err
	}
	f, err := w.file(ctx, rel, fd, st)
	if err != nil {
		return err
	}
	w.got.Result.OutputFiles = append(w.got.Result.OutputFiles, &repb.OutputFile{
		Path: path, Digest: f.digest.Proto(), IsExecutable: f.executable, NodeProperties: w.properties(&f.stat),
	})
	return nil
}

// outputSymlink collects a symlink as such, wherever it leads. Clients of API
// 2.0, and SDKs that never learnt of output_symlinks, look in the two older
// fields; which one depends on what the target is, as far as that is within
// the input root.
func (w *work) outputSymlink(path, rel string, want want) error {
	target, st, err := w.root.readlink(rel)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.EXDEV) {
		w.note("output %q is not returned: it lies behind symlinks that lead nowhere in the input root", path)
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "readlink", Path: rel, Err: err}
	}
	if err := w.count(1); err != nil {
		return err
	}
	if err := checkUTF8("target", target); err != nil {
		return err
	}
	s := &repb.OutputSymlink{Path: path, Target: target, NodeProperties: w.properties(&st)}
	r := w.got.Result
	if want == wantAny {
		r.OutputSymlinks = append(r.OutputSymlinks, s)
	}
	if w.root.isDirectory(rel) {
		r.OutputDirectorySymlinks = append(r.OutputDirectorySymlinks, s)
	} else {
		r.OutputFileSymlinks = append(r.OutputFileSymlinks, s)
	}
	return nil
}
