package asset

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/elan/digest"
)

// gitEntry is a line of git ls-tree.
type gitEntry struct {
	mode, id, path string
}

// The modes that trees have.
const (
	gitFile       = "100644"
	gitGroupFile  = "100664" // old
	gitExecutable = "100755"
	gitSymlink    = "120000"
	gitTree       = "040000"
	gitSubmodule  = "160000"
)

// store puts the tree of a commit, or a directory in it, into the store.
func (g *gitFetcher) store(ctx context.Context, r *repo, w *want, commit string) (digest.Digest, error) {
	entries, err := r.list(ctx, w, commit)
	if err != nil {
		return digest.Digest{}, err
	}
	u := g.s.newUploader(w.store, w.fn)
	files, links, err := r.contents(ctx, entries, u)
	if err != nil {
		return digest.Digest{}, err
	}
	b := &builder{}
	for _, e := range entries {
		switch e.mode {
		case gitTree, gitSubmodule:
			err = b.directory(e.path)
		case gitSymlink:
			err = b.link(e.path, links[e.id])
		case gitFile, gitGroupFile, gitExecutable:
			err = b.file(e.path, file{digest: files[e.id], executable: e.mode == gitExecutable})
		default:
			err = failed(Aborted, "%.200q has mode %.20q, which is not known", e.path, e.mode)
		}
		if err != nil {
			return digest.Digest{}, err
		}
	}
	return b.store(ctx, u, "")
}

// list lists what is in the tree.
func (r *repo) list(ctx context.Context, w *want, commit string) ([]gitEntry, error) {
	rev := commit + "^{tree}"
	if w.directory != "" {
		rev = commit + ":" + w.directory
	}
	treeID, err := r.output(ctx, "--git-dir="+r.dir+"/repo", "rev-parse", "--verify", "--quiet", "--end-of-options", rev)
	if err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		return nil, failed(NotFound, "commit %s has no directory %.200q", commit, w.directory)
	}
	cmd := r.command(ctx, "--git-dir="+r.dir+"/repo", "ls-tree", "-r", "-t", "-z", "--full-tree", "--end-of-options", strings.TrimSpace(string(treeID)))
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, r.own(err)
	}
	if err := cmd.Start(); err != nil {
		return nil, r.own(err)
	}
	entries, err := parseTree(out)
	if err != nil {
		_ = cmd.Cancel()
		_ = cmd.Wait() // it was killed
		return nil, err
	}
	if err := cmd.Wait(); err != nil {
		return nil, failed(NotFound, "commit %s has no directory %.200q", commit, w.directory)
	}
	return entries, nil
}

// parseTree reads the output of git ls-tree -z: mode, type, id and path.
func parseTree(r io.Reader) ([]gitEntry, error) {
	var entries []gitEntry
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxPathBytes+1024)
	s.Split(splitNUL)
	for s.Scan() {
		info, path, ok := strings.Cut(s.Text(), "\t")
		fields := strings.Fields(info)
		if !ok || len(fields) != 3 {
			return nil, failed(Aborted, "git lists %.200q, which is not understood", s.Text())
		}
		if len(entries) >= maxEntries {
			return nil, failed(TooLarge, "it has more than %d files", maxEntries)
		}
		entries = append(entries, gitEntry{mode: fields[0], id: fields[2], path: path})
	}
	if errors.Is(s.Err(), bufio.ErrTooLong) {
		return nil, failed(Aborted, "it has a path of more than %d bytes", maxPathBytes)
	}
	return entries, s.Err()
}

func splitNUL(data []byte, atEOF bool) (int, []byte, error) {
	if i := bytes.IndexByte(data, 0); i >= 0 {
		return i + 1, data[:i], nil
	}
	if atEOF && len(data) > 0 {
		return 0, nil, io.ErrUnexpectedEOF
	}
	return 0, nil, nil
}

// contents puts the files among entries into the store, each once, and returns
// their digests and the targets of symlinks, by id.
func (r *repo) contents(ctx context.Context, entries []gitEntry, u *uploader) (map[string]digest.Digest, map[string]string, error) {
	files, links := map[string]digest.Digest{}, map[string]string{}
	var ids []string // in the order in which they are asked for
	wanted := map[string]bool{}
	for _, e := range entries {
		if e.mode != gitTree && e.mode != gitSubmodule && !wanted[e.id] {
			wanted[e.id] = true
			ids = append(ids, e.id)
		}
	}
	symlink := map[string]bool{}
	for _, e := range entries {
		if e.mode == gitSymlink {
			symlink[e.id] = true
		}
	}
	err := r.cat(ctx, ids, func(id string, size int64, body io.Reader) error {
		if symlink[id] && size <= maxPathBytes {
			target, err := io.ReadAll(body)
			if err != nil {
				return err
			}
			links[id] = string(target)
			body = bytes.NewReader(target) // a file may have the same bytes
		}
		if size > u.room {
			return u.take(size)
		}
		d, err := u.file(ctx, body)
		files[id] = d
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return files, links, u.flush(ctx)
}

// cat calls visit with the size and the bytes of each of the blobs ids.
func (r *repo) cat(ctx context.Context, ids []string, visit func(id string, size int64, body io.Reader) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := r.command(ctx, "--git-dir="+r.dir+"/repo", "cat-file", "--batch", "--buffer")
	in, err := cmd.StdinPipe()
	if err != nil {
		return r.own(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return r.own(err)
	}
	if err := cmd.Start(); err != nil {
		return r.own(err)
	}
	var g errgroup.Group
	g.Go(func() error {
		defer in.Close() //nolint:errcheck // the end of the list
		w := bufio.NewWriter(in)
		for _, id := range ids {
			if _, err := w.WriteString(id + "\n"); err != nil {
				return err
			}
		}
		return w.Flush()
	})
	err = catAll(bufio.NewReaderSize(out, 64<<10), ids, visit)
	if err != nil {
		cancel() // git may have more to say, that nobody reads
	}
	werr := g.Wait()
	if e := errors.Join(werr, cmd.Wait()); err == nil && e != nil {
		err = r.own(e)
	}
	return err
}

// catAll reads the output of git cat-file --batch.
func catAll(out *bufio.Reader, ids []string, visit func(id string, size int64, body io.Reader) error) error {
	for _, id := range ids {
		line, err := out.ReadString('\n')
		if err != nil {
			return fmt.Errorf("git cat-file: %w", err)
		}
		fields := strings.Fields(line)
		if len(fields) != 3 || fields[0] != id || fields[1] != "blob" {
			return failed(Aborted, "the repository has no file %s that its tree names", id)
		}
		size, err := strconv.ParseInt(fields[2], 10, 64)
		if err != nil || size < 0 {
			return fmt.Errorf("git cat-file: size %q", fields[2])
		}
		body := &io.LimitedReader{R: out, N: size}
		if err := visit(id, size, body); err != nil {
			return err
		}
		if body.N != 0 {
			return fmt.Errorf("git cat-file: %w", io.ErrUnexpectedEOF)
		}
		if _, err := out.Discard(1); err != nil { // the line's end after it
			return fmt.Errorf("git cat-file: %w", err)
		}
	}
	return nil
}
