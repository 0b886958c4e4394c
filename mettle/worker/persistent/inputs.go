//go:build linux

package persistent

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/tree"
	"github.com/mettle-build/mettle/mettle/command"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
	persistentpb "github.com/mettle-build/mettle/proto/persistent"
)

// Inputs reads input roots and builds them in two parts, the tool's files and the
// rest. It is safe for concurrent use: all slots of a worker share one for each store.
type Inputs struct {
	store   blob.Store
	held    *overlay
	builder *inputroot.Builder
	cache   *cache
}

// NewInputs returns the Inputs of a store. Under the policy LinkAndAudit files are
// copied: a process that lives on could change a linked one after the audit.
func NewInputs(store blob.Store, policy inputroot.LinkPolicy) (*Inputs, error) {
	if policy == inputroot.LinkAndAudit {
		policy = inputroot.Copy
	}
	held := &overlay{Store: store, blobs: make(map[digest.Digest]*heldBlob)}
	b, err := inputroot.New(inputroot.Options{Store: held.withAbilities(), Policy: policy})
	if err != nil {
		return nil, err
	}
	return &Inputs{store: store, held: held, builder: b, cache: &cache{young: make(map[digest.Digest]*repb.Directory)}}, nil
}

// inputs is an input root in two parts, each of which is one, too. What of them is
// in no store is held until release.
type inputs struct {
	tool, rest digest.Digest
	files      []*persistentpb.Input // all of them
	held       []digest.Digest
}

// Bounds of an input root, which inputroot has too.
const (
	maxDepth   = 256
	maxEntries = 1_000_000
	// maxPathBytes bounds the paths of all files together: equal subtrees, of which
	// there is one message, have many.
	maxPathBytes = 64 << 20
	// maxDirectoryBytes bounds one Directory message.
	maxDirectoryBytes = 16 << 20
)

// split reads the input root of req.
func (i *Inputs) split(ctx context.Context, req *Request) (_ *inputs, err error) {
	s := &splitter{i: i, fn: req.Root.Function(), dirs: make(map[digest.Digest]*repb.Directory), in: &inputs{}}
	defer func() {
		if err != nil {
			i.release(s.in)
		}
	}()
	if err := s.load(ctx, req.Root); err != nil {
		return nil, err
	}
	if !s.marked {
		s.named = namedFiles(req)
	}
	wd := command.WorkingDirectory(req.Command)
	s.above = strings.Repeat("../", strings.Count(wd, "/")+1)
	if wd == "" {
		s.above = ""
	} else {
		s.below = wd + "/"
	}
	tool, rest, err := s.directory("", req.Root, 0)
	if err != nil {
		return nil, err
	}
	if s.in.tool, err = s.orEmpty(tool); err != nil {
		return nil, err
	}
	s.in.rest, err = s.orEmpty(rest)
	return s.in, err
}

// release lets go of what split has held.
func (i *Inputs) release(in *inputs) { i.held.release(in.held) }

// splitter is one split.
type splitter struct {
	i       *Inputs
	fn      digest.Function
	dirs    map[digest.Digest]*repb.Directory
	marked  bool                // the client says which files are the tool's
	named   map[string]struct{} // these are, where it doesn't
	above   string              // from the working directory to the root
	below   string              // from the root into the working directory
	entries int
	paths   int // bytes
	in      *inputs
}

// load reads all Directories, level by level.
func (s *splitter) load(ctx context.Context, root digest.Digest) error {
	level := []digest.Digest{root}
	for depth := 0; len(level) > 0; depth++ {
		if depth > maxDepth {
			return fmt.Errorf("%w: directories are over %d levels deep", tree.ErrInvalid, maxDepth)
		}
		if err := s.i.bring(ctx, level); err != nil {
			return err
		}
		var next []digest.Digest
		for _, d := range level {
			m, err := s.i.read(ctx, d)
			if err != nil {
				return fmt.Errorf("directory %s: %w", d, err)
			}
			s.dirs[d] = m
			s.marked = s.marked || hasToolInput(m)
			for _, c := range m.Directories {
				cd, err := digest.FromProto(s.fn, c.Digest)
				if err != nil {
					return err
				}
				if _, seen := s.dirs[cd]; !seen {
					s.dirs[cd] = nil
					next = append(next, cd)
				}
			}
		}
		if len(s.dirs) > maxEntries {
			return errTooMany
		}
		level = next
	}
	return nil
}

var errTooMany = fmt.Errorf("%w: over %d files and directories", tree.ErrInvalid, maxEntries)

func isToolInput(p *repb.NodeProperties) bool {
	for _, q := range p.GetProperties() {
		if q.GetName() == toolInput {
			return true
		}
	}
	return false
}

func hasToolInput(m *repb.Directory) bool {
	for _, f := range m.Files {
		if isToolInput(f.NodeProperties) {
			return true
		}
	}
	return false
}

// namedFiles are the paths that the command line of the tool names, by themselves,
// after an equals sign, or in a list with colons, and its runfiles.
func namedFiles(req *Request) map[string]struct{} {
	named := make(map[string]struct{})
	wd := command.WorkingDirectory(req.Command)
	add := func(s string) {
		for p := range strings.SplitSeq(s, ":") {
			if p != "" && p[0] != '/' {
				named[path.Join(wd, p)] = struct{}{}
			}
		}
	}
	for _, a := range req.Tool.Startup {
		add(a)
		if _, value, ok := strings.Cut(a, "="); ok {
			add(value)
		}
	}
	for _, suffix := range []string{".runfiles", ".runfiles_manifest", ".repo_mapping"} {
		add(req.Tool.Startup[0] + suffix)
	}
	return named
}

// isRunfiles reports whether the directory is one of the program's runfiles. Other
// directories that are named can be anything.
func (s *splitter) isRunfiles(dir string) bool {
	_, ok := s.named[dir]
	return ok && strings.HasSuffix(dir, ".runfiles")
}

// directory splits the directory d at a path, which is empty or ends in a slash. A
// part that has nothing in it is the zero Digest.
func (s *splitter) directory(at string, d digest.Digest, depth int) (tool, rest digest.Digest, err error) {
	m := s.dirs[d]
	if depth > maxDepth {
		return tool, rest, fmt.Errorf("%w: directories are over %d levels deep", tree.ErrInvalid, maxDepth)
	}
	if s.entries += len(m.Files) + len(m.Directories) + len(m.Symlinks); s.entries > maxEntries {
		return tool, rest, errTooMany
	}
	t, r := &repb.Directory{NodeProperties: m.NodeProperties}, &repb.Directory{NodeProperties: m.NodeProperties}
	inside := s.isRunfiles(strings.TrimSuffix(at, "/"))
	for _, f := range m.Files {
		if err := s.list(at, f); err != nil {
			return tool, rest, err
		}
		_, named := s.named[at+f.Name]
		if named || inside || isToolInput(f.NodeProperties) {
			t.Files = append(t.Files, f)
		} else {
			r.Files = append(r.Files, f)
		}
	}
	for _, l := range m.Symlinks {
		if inside || isToolInput(l.NodeProperties) {
			t.Symlinks = append(t.Symlinks, l)
		} else {
			r.Symlinks = append(r.Symlinks, l)
		}
	}
	whole := true // is the rest
	for _, c := range m.Directories {
		cd, err := digest.FromProto(s.fn, c.Digest)
		if err != nil {
			return tool, rest, err
		}
		var ct, cr digest.Digest
		if inside {
			if err := s.wholly(at+c.Name+"/", cd, depth+1); err != nil {
				return tool, rest, err
			}
			ct = cd
		} else if ct, cr, err = s.directory(at+c.Name+"/", cd, depth+1); err != nil {
			return tool, rest, err
		}
		if !ct.IsZero() {
			t.Directories = append(t.Directories, &repb.DirectoryNode{Name: c.Name, Digest: ct.Proto()})
			whole = false
		}
		if !cr.IsZero() {
			r.Directories = append(r.Directories, &repb.DirectoryNode{Name: c.Name, Digest: cr.Proto()})
		}
	}
	return s.parts(d, t, r, whole)
}

// parts are the digests of the parts of d.
func (s *splitter) parts(d digest.Digest, t, r *repb.Directory, whole bool) (tool, rest digest.Digest, err error) {
	switch {
	case whole && len(t.Files)+len(t.Symlinks) == 0:
		return digest.Digest{}, d, nil
	case len(r.Files)+len(r.Symlinks)+len(r.Directories) == 0 && d == s.sameAs(t):
		return d, digest.Digest{}, nil
	}
	if tool, err = s.hold(t); err != nil {
		return tool, rest, err
	}
	if len(r.Files)+len(r.Symlinks)+len(r.Directories) > 0 {
		rest, err = s.hold(r)
	}
	return tool, rest, err
}

// sameAs is the digest of m, or the zero Digest.
func (s *splitter) sameAs(m *repb.Directory) digest.Digest {
	d, _, err := digest.OfMessage(s.fn, m)
	if err != nil {
		return digest.Digest{}
	}
	return d
}

// wholly lists the files of a directory that is all the tool's.
func (s *splitter) wholly(at string, d digest.Digest, depth int) error {
	m := s.dirs[d]
	if s.entries += len(m.Files) + len(m.Directories) + len(m.Symlinks); s.entries > maxEntries || depth > maxDepth {
		return errTooMany
	}
	for _, f := range m.Files {
		if err := s.list(at, f); err != nil {
			return err
		}
	}
	for _, c := range m.Directories {
		cd, err := digest.FromProto(s.fn, c.Digest)
		if err != nil {
			return err
		}
		if err := s.wholly(at+c.Name+"/", cd, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// list adds a file to those that the request names.
func (s *splitter) list(at string, f *repb.FileNode) error {
	p := s.seen(at + f.Name)
	if s.paths += len(p); s.paths > maxPathBytes {
		return fmt.Errorf("%w: the paths of its files have over %d bytes", tree.ErrInvalid, maxPathBytes)
	}
	s.in.files = append(s.in.files, &persistentpb.Input{Path: p, Digest: []byte(f.Digest.GetHash())})
	return nil
}

// seen is a path of the input root as the tool sees it, from its directory.
func (s *splitter) seen(p string) string {
	if rest, ok := strings.CutPrefix(p, s.below); ok {
		return rest
	}
	return s.above + p
}

// hold makes m readable to the builder.
func (s *splitter) hold(m *repb.Directory) (digest.Digest, error) {
	d, data, err := digest.OfMessage(s.fn, m)
	if err != nil {
		return d, err
	}
	if !d.IsEmpty() {
		s.i.held.hold(d, data)
		s.in.held = append(s.in.held, d)
	}
	return d, nil
}

func (s *splitter) orEmpty(d digest.Digest) (digest.Digest, error) {
	if d.IsZero() {
		return s.hold(&repb.Directory{})
	}
	return d, nil
}

// bring has those of ds fetched that are not here, where that is a thing.
func (i *Inputs) bring(ctx context.Context, ds []digest.Digest) error {
	fetcher, ok := blob.As[blob.Fetcher](i.store)
	if !ok {
		return nil
	}
	var wanted []digest.Digest
	for _, d := range ds {
		if d.Size() <= maxDirectoryBytes && !d.IsEmpty() && i.cache.get(d) == nil {
			wanted = append(wanted, d)
		}
	}
	if len(wanted) == 0 {
		return nil
	}
	missing, err := fetcher.Fetch(ctx, wanted)
	if err == nil && len(missing) > 0 {
		err = &blob.MissingError{Digests: missing}
	}
	return err
}

// read reads a Directory.
func (i *Inputs) read(ctx context.Context, d digest.Digest) (*repb.Directory, error) {
	if m := i.cache.get(d); m != nil {
		return m, nil
	}
	m := &repb.Directory{}
	if !d.IsEmpty() {
		if err := blob.ReadMessage(ctx, i.store, d, maxDirectoryBytes, m); err != nil {
			return nil, err
		}
	}
	if err := tree.Validate(d.Function(), m); err != nil {
		return nil, err
	}
	i.cache.put(d, m)
	return m, nil
}

// build makes one of the two parts.
func (i *Inputs) build(ctx context.Context, r inputroot.Request) error {
	_, err := i.builder.Build(ctx, r)
	if missing, ok := errors.AsType[*blob.MissingError](err); ok {
		// Of both parts, the plain run tells.
		return fmt.Errorf("%d inputs are missing", len(missing.Digests))
	}
	return err
}
