package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"slices"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/chunked"
	"github.com/mettle-build/mettle/elan/blob/open"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/elan/inventory"
	"github.com/mettle-build/mettle/elan/tool"
)

// defaultRemote is where elan serves where nobody says otherwise.
const defaultRemote = "localhost:7777"

// target is the store that a command works on: a server's, or one that it opens
// itself.
type target struct {
	// The variable counts only where no flag names a store.
	Remote   string `help:"The server whose store it is, HOST:PORT. Default: ${default_remote} ($$ELAN_REMOTE)." placeholder:"HOST:PORT" env:"-"`
	Instance string `help:"The instance name, as in --remote_instance_name of a build."`
	flags.Caller
	// The variable of serve would have every command open the server's store.
	Storage string `help:"A store to open instead, that no server has open: file:///DIRECTORY, gs://BUCKET/PREFIX or s3://BUCKET/PREFIX." placeholder:"URL" env:"-"`
}

// opened is a store that a command works on.
type opened struct {
	store   blob.Store
	inv     inventory.Inventory
	results tool.Results
	close   func() error
}

// open connects to the server or opens the store.
func (t *target) open(ctx context.Context, log *slog.Logger) (*opened, error) {
	switch {
	case t.Remote != "" && t.Storage != "":
		return nil, errors.New("--remote and --storage are two stores; give one of them")
	case t.Storage != "":
		return t.openStorage(ctx, log)
	}
	return t.connect(ctx)
}

func (t *target) connect(ctx context.Context) (*opened, error) {
	remote := cmp.Or(t.Remote, os.Getenv("ELAN_REMOTE"), defaultRemote)
	if strings.HasPrefix(remote, "http://") || strings.HasPrefix(remote, "https://") {
		return nil, fmt.Errorf("--remote=%s: want HOST:PORT, of the port for gRPC", remote)
	}
	addr, opts, err := t.Dial(remote, nil)
	if err != nil {
		return nil, fmt.Errorf("--remote: %w", err)
	}
	conn, err := client.Dial(ctx, addr, opts...)
	if err != nil {
		return nil, fmt.Errorf("%w (is a server running there? --remote names another, and --storage a store without a server)", err)
	}
	c, err := client.New(client.Options{Conn: conn, Instance: t.Instance})
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return &opened{store: c, inv: client.NewAdmin(conn), results: c, close: conn.Close}, nil
}

func (t *target) openStorage(ctx context.Context, log *slog.Logger) (*opened, error) {
	u, err := url.Parse(t.Storage)
	if err != nil {
		return nil, fmt.Errorf("--storage: %w", err)
	}
	switch u.Scheme {
	case "mem":
		return nil, errors.New("--storage=mem:// would be a new and empty store; a server's is looked at by --remote")
	case "file":
		// A command makes no store where it was to look at one.
		if info, err := os.Stat(u.Path); err != nil || !info.IsDir() {
			return nil, fmt.Errorf("--storage: there is no store in %s", u.Path)
		}
	}
	s, err := open.Open(ctx, open.Options{
		MinFreeBytes: -1, // it is for the server to make room, and not for who looks
		Logger:       slog.New(warnings{log.Handler()}),
	}, t.Storage)
	if err != nil {
		if errors.Is(err, open.ErrInUse) {
			err = fmt.Errorf("%w (a store that a server has open is reached through it, by --remote)", err)
		}
		return nil, err
	}
	// As serve has it: some blobs are in chunks.
	blobs, err := chunked.New(chunked.Options{Store: s, Entries: s, Logger: log})
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	inv, err := inventory.NewLocal(inventory.Options{Store: blobs, Entries: blobs})
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return &opened{store: blobs, inv: inv, results: entryResults{blobs}, close: s.Close}, nil
}

// warnings is a Handler of what went wrong alone: a store tells a server's
// operator more than who looks at it wants to read.
type warnings struct{ slog.Handler }

// Enabled implements slog.Handler.
func (h warnings) Enabled(ctx context.Context, l slog.Level) bool {
	return (l >= slog.LevelWarn || h.Handler.Enabled(ctx, slog.LevelDebug)) && h.Handler.Enabled(ctx, l)
}

// WithAttrs implements slog.Handler.
func (h warnings) WithAttrs(attrs []slog.Attr) slog.Handler {
	return warnings{h.Handler.WithAttrs(attrs)}
}

// WithGroup implements slog.Handler.
func (h warnings) WithGroup(name string) slog.Handler { return warnings{h.Handler.WithGroup(name)} }

// absent is an error that names what was not there, a line each; nil if nothing.
func absent[T fmt.Stringer](ts []T) error {
	errs := make([]error, len(ts))
	for i, t := range ts {
		errs[i] = fmt.Errorf("%s is not there", t)
	}
	return errors.Join(errs...)
}

// locate returns ds, those of them in the space of --instance that are there, and
// nowhere else: where instances are kept apart, nobody has to know their spaces.
func (t *target) locate(ctx context.Context, inv inventory.Inventory, ds []digest.Digest) ([]digest.Digest, error) {
	infos, err := inv.Stat(ctx, ds)
	there := make(map[digest.Digest]bool, len(infos))
	for _, i := range infos {
		there[i.Digest] = true
	}
	var apart []digest.Digest
	for _, d := range absentOf(ds, there) {
		if d.Space().IsZero() {
			apart = append(apart, d.In(digest.SpaceOf(t.Instance)))
		}
	}
	if err != nil || len(apart) == 0 {
		return ds, err
	}
	if infos, err = inv.Stat(ctx, apart); err != nil || len(infos) == 0 {
		return ds, err
	}
	located := slices.Clone(ds)
	within := make(map[digest.Digest]digest.Digest, len(infos))
	for _, i := range infos {
		within[i.Digest.Plain()] = i.Digest
	}
	for i, d := range located {
		if in, ok := within[d]; ok {
			located[i] = in
		}
	}
	return located, nil
}

// with opens the target, calls f, and closes it.
func (t *target) with(ctx context.Context, log *slog.Logger, f func(*opened) error) (err error) {
	o, err := t.open(ctx, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.close()) }()
	return f(o)
}

// maxResultBytes bounds a stored result that is read to be looked at.
const maxResultBytes = 64 << 20

// entryResults reads results as they are stored, complete or not.
type entryResults struct{ blob.Entries }

// Get implements tool.Results.
func (e entryResults) Get(ctx context.Context, k blob.EntryKey) (*repb.ActionResult, error) {
	if instance, ok := action.CutFailedInstance(k.Instance); ok {
		failures, err := action.NewFailures(action.FailuresOptions{Entries: e})
		if err != nil {
			return nil, err
		}
		f, err := failures.Get(ctx, blob.EntryKey{Instance: instance, Action: k.Action})
		if err != nil {
			return nil, err
		}
		return f.Response.GetResult(), nil
	}
	value, err := e.Entry(ctx, k)
	if err != nil {
		return nil, err
	}
	r := &repb.ActionResult{}
	if len(value) > maxResultBytes || proto.Unmarshal(value, r) != nil {
		return nil, fmt.Errorf("entry %s: %w: it is no ActionResult", k.Action, blob.ErrMalformed)
	}
	return r, nil
}

// digestArgs are digests given as arguments, or by the standard input.
type digestArgs struct {
	Digests []string `arg:"" name:"digest" help:"The digests: HASH/SIZE, HASH-SIZE or HASH:SIZE, and before it the digest function where it is not sha256, as in blake3:HASH/SIZE. '-' reads them from the standard input, the first word of each line, as ls prints them."`
}

// maxLine bounds a line of the standard input in bytes.
const maxLine = 1 << 20

// parse reads the digests.
func (a *digestArgs) parse(in io.Reader) ([]digest.Digest, error) {
	var texts []string
	for _, text := range a.Digests {
		if text != "-" {
			texts = append(texts, text)
			continue
		}
		lines := bufio.NewScanner(in)
		lines.Buffer(nil, maxLine)
		for lines.Scan() {
			if words := strings.Fields(lines.Text()); len(words) > 0 {
				texts = append(texts, words[0])
			}
		}
		if err := lines.Err(); err != nil {
			return nil, fmt.Errorf("read the digests: %w", err)
		}
	}
	return tool.ParseDigests(texts)
}

// keys are the entries of the actions ds in the target's instance.
func (t *target) keys(ds []digest.Digest) []blob.EntryKey {
	ks := make([]blob.EntryKey, len(ds))
	for i, d := range ds {
		ks[i] = blob.EntryKey{Instance: t.Instance, Action: d}
	}
	return ks
}
