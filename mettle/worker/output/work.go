//go:build linux

package output

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
	"unicode/utf8"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// work is one Collect.
type work struct {
	c    *Collector
	req  *Request
	got  *Collected
	root *rootDir // nil: not needed yet

	wantMtime, wantMode bool
	entries             int

	// known has the files that were adopted, by inode. Outputs may overlap,
	// and adopting a file changes its mode.
	known map[inode]file
	// uploads are what the store may lack; they wait for one question about
	// all of them. There are none with an Adopter.
	uploads map[digest.Digest]upload

	// adopted and made are here and wait to be passed on, with a LateAdopter.
	adopted      []digest.Digest
	made         []blob.Bytes
	waitingBytes int64 // of both
}

// maxWaiting and maxWaitingBytes bound what waits to be passed on: a cache keeps it,
// and Trees are in memory.
const (
	maxWaiting      = 4096
	maxWaitingBytes = 64 << 20
)

type inode struct{ dev, ino uint64 }

// file is a regular file that was taken in.
type file struct {
	digest     digest.Digest
	executable bool
	stat       unix.Stat_t // before anything changed it
}

// upload is a blob: bytes, or a file by its path in the root or outside.
type upload struct {
	data    []byte
	rel     string
	outside string
}

// maxNotes bounds the notes of one action: they are for a person.
const maxNotes = 20

func (w *work) note(format string, args ...any) {
	if len(w.got.Notes) < maxNotes {
		w.got.Notes = append(w.got.Notes, fmt.Sprintf(format, args...))
	}
}

func (w *work) openRoot() error {
	if w.root != nil {
		return nil
	}
	r, err := openRootDir(w.req.Root)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return fmt.Errorf("%w: the command has removed or replaced its input root", ErrUnusable)
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: w.req.Root, Err: err}
	}
	w.root = r
	return nil
}

func (w *work) close() {
	if w.root != nil {
		w.root.close()
	}
}

func (w *work) count(n int) error {
	if w.entries += n; w.entries > w.c.o.MaxEntries {
		return fmt.Errorf("%w: over %d files, directories and symlinks", ErrUnusable, w.c.o.MaxEntries)
	}
	return nil
}

func checkUTF8(what, s string) error {
	if !utf8.ValidString(s) {
		return fmt.Errorf("%w: the %s %q is not UTF-8, as the REAPI needs it", ErrUnusable, what, s)
	}
	return nil
}

// properties are those that the Command asks for.
func (w *work) properties(st *unix.Stat_t) *repb.NodeProperties {
	if !w.wantMtime && !w.wantMode {
		return nil
	}
	p := &repb.NodeProperties{}
	if w.wantMtime {
		p.Mtime = timestamppb.New(time.Unix(st.Mtim.Unix()))
	}
	if w.wantMode {
		p.UnixMode = wrapperspb.UInt32(st.Mode & 0o7777)
	}
	return p
}

// foreign reports whether the command's user may not read a file. The worker may
// be able to where the command is not: it must not fetch for it what it moved or
// linked here.
func (w *work) foreign(st *unix.Stat_t) bool {
	o := w.req.Owner
	switch {
	case !o.Set || int(st.Uid) == o.UID || st.Mode&0o004 != 0:
		return false
	default:
		return int(st.Gid) != o.GID || st.Mode&0o040 == 0
	}
}

// file takes in the regular file fd, which it closes.
func (w *work) file(ctx context.Context, rel string, fd int, st *unix.Stat_t) (file, error) {
	f := os.NewFile(uintptr(fd), rel)
	defer f.Close() //nolint:errcheck // opened for reading
	got := file{executable: st.Mode&0o111 != 0, stat: *st}
	if st.Size == 0 {
		got.digest = digest.Empty(w.req.Function)
		return got, nil
	}
	id := inode{st.Dev, st.Ino}
	if k, ok := w.known[id]; ok {
		return k, nil
	}
	var err error
	if w.c.adopter != nil {
		got.digest, err = w.adopt(ctx, f)
	} else if got.digest, err = hashFile(ctx, w.req.Function, f); err == nil {
		w.upload(got.digest, upload{rel: rel})
	}
	if err != nil {
		return file{}, err
	}
	if w.known == nil {
		w.known = make(map[inode]file)
	}
	w.known[id] = got
	return got, nil
}

//nolint:gochecknoglobals // a pool is shared by design
var buffers = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

func hashFile(ctx context.Context, fn digest.Function, f *os.File) (digest.Digest, error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	st, err := f.Stat()
	if err != nil {
		return digest.Digest{}, err
	}
	h := fn.New(st.Size())
	var size int64
	for {
		if err := context.Cause(ctx); err != nil {
			return digest.Digest{}, err
		}
		n, err := f.Read(*buf)
		h.Write((*buf)[:n])
		size += int64(n)
		if errors.Is(err, io.EOF) || size > st.Size() {
			break
		}
		if err != nil {
			return digest.Digest{}, err
		}
	}
	if size != st.Size() {
		return digest.Digest{}, fmt.Errorf("%s: its size changed from %d to %d bytes while it was read", f.Name(), st.Size(), size)
	}
	return digest.FromHash(fn, h, size), nil
}

func (w *work) upload(d digest.Digest, u upload) {
	if w.uploads == nil {
		w.uploads = make(map[digest.Digest]upload)
	}
	w.uploads[d] = u
}

// put takes in bytes that we made.
func (w *work) put(ctx context.Context, d digest.Digest, data []byte) error {
	if d.IsEmpty() {
		return nil // every store has it
	}
	if w.c.adopter == nil {
		w.upload(d, upload{data: data})
		return nil
	}
	if w.c.late != nil {
		w.made = append(w.made, blob.Bytes{Digest: d, Data: data})
		return w.waits(ctx, d)
	}
	return blob.WriteBytes(ctx, w.c.o.Store, d, data)
}

// adopt takes in a file. It returns before the file is where it belongs if there is
// more to go there with it.
func (w *work) adopt(ctx context.Context, f *os.File) (digest.Digest, error) {
	if w.c.late == nil {
		return w.c.adopter.Adopt(ctx, w.req.Function, f)
	}
	d, err := w.c.late.AdoptLate(ctx, digest.Space{}, w.req.Function, f)
	if err != nil {
		return d, err
	}
	w.adopted = append(w.adopted, d)
	return d, w.waits(ctx, d)
}

// waits counts d in, and passes on what waits if it is much.
func (w *work) waits(ctx context.Context, d digest.Digest) error {
	w.waitingBytes += d.Size()
	if len(w.adopted)+len(w.made) < maxWaiting && w.waitingBytes < maxWaitingBytes {
		return nil
	}
	return w.pass(ctx)
}

// pass passes on what waits.
func (w *work) pass(ctx context.Context) error {
	if len(w.adopted)+len(w.made) == 0 {
		return nil
	}
	err := w.c.late.Pass(ctx, w.adopted, w.made)
	w.adopted, w.made, w.waitingBytes = w.adopted[:0], nil, 0
	return err
}

// flush uploads what the store lacks.
func (w *work) flush(ctx context.Context) error {
	if err := w.pass(ctx); err != nil {
		return err
	}
	if len(w.uploads) == 0 {
		return nil
	}
	ds := make([]digest.Digest, 0, len(w.uploads))
	for d := range w.uploads {
		ds = append(ds, d)
	}
	missing, err := w.c.o.Store.FindMissing(ctx, ds)
	if err != nil {
		return fmt.Errorf("find out which outputs are to be uploaded: %w", err)
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(w.c.o.MaxUploads)
	for _, d := range missing {
		group.Go(func() error { return w.send(ctx, d, w.uploads[d]) })
	}
	return group.Wait()
}

func (w *work) send(ctx context.Context, d digest.Digest, u upload) error {
	if u.data != nil {
		return blob.WriteBytes(ctx, w.c.o.Store, d, u.data)
	}
	return blob.Repeat(ctx, w.c.o.Store, func(ctx context.Context) error {
		f, err := w.reopen(u)
		if err != nil {
			return fmt.Errorf("open an output again: %w", err)
		}
		defer f.Close() //nolint:errcheck // opened for reading
		return blob.Receive(ctx, w.c.o.Store, d, f)
	})
}

func (w *work) reopen(u upload) (*os.File, error) {
	if u.outside != "" {
		return os.OpenFile(u.outside, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	}
	fd, st, err := w.root.open(u.rel)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: u.rel, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		// A FIFO would have us wait for its writer.
		unix.Close(fd) //nolint:errcheck // opened for reading
		return nil, fmt.Errorf("%s is no file any more", u.rel)
	}
	return os.NewFile(uintptr(fd), u.rel), nil
}

// streams takes stdout and stderr in. Empty ones are not mentioned at all.
func (w *work) streams(ctx context.Context) (err error) {
	r, q := w.got.Result, w.req
	if r.StdoutRaw, r.StdoutDigest, err = w.stream(ctx, q.Stdout, q.StdoutBytes); err != nil {
		return fmt.Errorf("stdout: %w", err)
	}
	if r.StderrRaw, r.StderrDigest, err = w.stream(ctx, q.Stderr, q.StderrBytes); err != nil {
		return fmt.Errorf("stderr: %w", err)
	}
	return nil
}

func (w *work) stream(ctx context.Context, path string, size int64) (raw []byte, m *repb.Digest, err error) {
	if size == 0 {
		return nil, nil, nil
	}
	f, err := openStream(path, size)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close() //nolint:errcheck // opened for reading
	var d digest.Digest
	switch {
	case size <= w.c.o.MaxInlineBytes:
		raw = make([]byte, size)
		if _, err := io.ReadFull(f, raw); err != nil {
			return nil, nil, err
		}
		d = digest.Of(w.req.Function, raw)
		err = w.put(ctx, d, raw)
	case w.c.adopter != nil:
		d, err = w.adopt(ctx, f)
	default:
		if d, err = hashFile(ctx, w.req.Function, f); err == nil {
			w.upload(d, upload{outside: path})
		}
	}
	if err != nil {
		return nil, nil, err
	}
	return raw, d.Proto(), nil
}

// openStream opens stdout or stderr of that size. Where commands have no user of
// their own, one may have put something else in its place: a FIFO, say, whose
// opening would wait for a writer.
func openStream(path string, size int64) (*os.File, error) {
	fd, err := unix.Open(path, openFlags|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.EACCES) && makeReadable(path) {
		fd, err = unix.Open(path, openFlags|unix.O_NOFOLLOW, 0)
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("%w: the command has removed or replaced it", ErrUnusable)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && (st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size < size) {
		err = fmt.Errorf("%w: the command has replaced it", ErrUnusable)
	}
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, 0) // see rootDir.open
	}
	if err != nil {
		unix.Close(fd) //nolint:errcheck // opened for reading
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// makeReadable gives a file a mode by which we can read it: a command that is our own
// user may have taken that away. What is there is no process's any more.
func makeReadable(path string) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && unix.Chmod(path, 0o600) == nil
}
