package tool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// maxMessageBytes bounds what is read to be described, but for Trees.
const maxMessageBytes = 64 << 20

// Kinds are what a blob can be described as. A result is that of the Action with
// the digest.
func Kinds() []string { return []string{"action", "command", "directory", "tree", "result"} }

// Description says what Describe describes.
type Description struct {
	Kind     string // one of Kinds
	Digest   digest.Digest
	Instance string // of a result
}

// Describe prints to w what a blob means, or the result of an action, in lines
// of a name, a colon and a value. An Action is described with its Command.
func Describe(ctx context.Context, w io.Writer, s blob.Opener, r Results, what Description) error {
	p := &printer{w: w}
	var err error
	switch what.Kind {
	case "action":
		err = p.action(ctx, s, what.Digest)
	case "command":
		err = p.command(ctx, s, what.Digest)
	case "directory", "tree":
		err = p.tree(ctx, s, what.Digest)
	case "result":
		err = p.result(ctx, r, blob.EntryKey{Instance: what.Instance, Action: what.Digest})
	default:
		err = fmt.Errorf("%q is not one of %v", what.Kind, Kinds())
	}
	return errors.Join(p.err, err)
}

// printer prints lines until a write fails.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) line(name, format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, "%s: %s\n", name, fmt.Sprintf(format, args...))
	}
}

// digest is a digest field as text that ParseDigest reads.
func digestText(fn digest.Function, m *repb.Digest) string {
	if m == nil {
		return "absent"
	}
	d, err := digest.FromProto(fn, m)
	if err != nil {
		return err.Error()
	}
	return d.String()
}

func (p *printer) action(ctx context.Context, s blob.Opener, d digest.Digest) error {
	a := &repb.Action{}
	if err := blob.ReadMessage(ctx, s, d, maxMessageBytes, a); err != nil {
		return short(err, d)
	}
	fn := d.Function()
	p.line("action", "%s", d)
	p.line("command_digest", "%s", digestText(fn, a.CommandDigest))
	p.line("input_root_digest", "%s", digestText(fn, a.InputRootDigest))
	if a.Timeout != nil {
		p.line("timeout", "%s", a.Timeout.AsDuration())
	}
	if a.DoNotCache {
		p.line("do_not_cache", "true")
	}
	if len(a.Salt) > 0 {
		p.line("salt", "%q", a.Salt)
	}
	p.platform(a.Platform)
	c, err := digest.FromProto(fn, a.CommandDigest)
	if err != nil {
		return fmt.Errorf("action %s: command_digest: %w", d, err)
	}
	err = p.command(ctx, s, c)
	if errors.Is(err, blob.ErrNotFound) {
		p.line("command", "%s is not in the store", c)
		return nil
	}
	return err
}

func (p *printer) platform(m *repb.Platform) {
	for _, prop := range m.GetProperties() {
		p.line("platform", "%s=%s", plain(prop.Name), plain(prop.Value))
	}
}

func (p *printer) command(ctx context.Context, s blob.Opener, d digest.Digest) error {
	c := &repb.Command{}
	if err := blob.ReadMessage(ctx, s, d, maxMessageBytes, c); err != nil {
		return short(err, d)
	}
	words := make([]string, len(c.Arguments))
	for i, a := range c.Arguments {
		words[i] = shellWord(a)
	}
	p.line("command", "%s", strings.Join(words, " "))
	if c.WorkingDirectory != "" {
		p.line("working_directory", "%s", plain(c.WorkingDirectory))
	}
	for _, v := range c.EnvironmentVariables {
		p.line("environment", "%s=%s", plain(v.Name), shellWord(v.Value))
	}
	p.platform(c.Platform)
	for _, path := range c.OutputPaths {
		p.line("output_path", "%s", plain(path))
	}
	for _, path := range c.OutputFiles {
		p.line("output_file", "%s", plain(path))
	}
	for _, path := range c.OutputDirectories {
		p.line("output_directory", "%s", plain(path))
	}
	return nil
}

// tree prints a line for each file, directory and symlink.
func (p *printer) tree(ctx context.Context, s blob.Opener, d digest.Digest) error {
	nodes, err := expand(ctx, s, d)
	if err != nil {
		return err
	}
	slices.SortFunc(nodes, func(a, b node) int { return strings.Compare(a.path, b.path) })
	for _, n := range nodes {
		switch {
		case n.dir:
			p.line("directory", "%s/ %s", plain(n.path), n.content)
		case n.file == nil:
			p.line("symlink", "%s -> %s", plain(n.path), plain(n.target))
		case n.file.IsExecutable:
			p.line("executable", "%s %s", plain(n.path), n.content)
		default:
			p.line("file", "%s %s", plain(n.path), n.content)
		}
	}
	return nil
}

func (p *printer) result(ctx context.Context, results Results, k blob.EntryKey) error {
	r, err := results.Get(ctx, k)
	if errors.Is(err, blob.ErrNotFound) {
		return fmt.Errorf("result of action %s in instance %q: %w", k.Action, k.Instance, blob.ErrNotFound)
	}
	if err != nil {
		return err //nolint:wrapcheck // it names the action
	}
	fn := k.Action.Function()
	p.line("action", "%s", k.Action)
	p.line("exit_code", "%d", r.ExitCode)
	for _, f := range r.OutputFiles {
		kind := "output_file"
		if f.IsExecutable {
			kind = "output_executable"
		}
		p.line(kind, "%s %s", plain(f.Path), digestText(fn, f.Digest))
	}
	for _, d := range r.OutputDirectories {
		if d.TreeDigest != nil {
			p.line("output_tree", "%s/ %s", plain(d.Path), digestText(fn, d.TreeDigest))
		}
		if d.RootDirectoryDigest != nil {
			p.line("output_directory", "%s/ %s", plain(d.Path), digestText(fn, d.RootDirectoryDigest))
		}
	}
	for _, links := range [][]*repb.OutputSymlink{r.OutputSymlinks, r.OutputFileSymlinks, r.OutputDirectorySymlinks} {
		for _, l := range links {
			p.line("output_symlink", "%s -> %s", plain(l.Path), plain(l.Target))
		}
	}
	p.stream("stdout", fn, r.StdoutDigest, r.StdoutRaw)
	p.stream("stderr", fn, r.StderrDigest, r.StderrRaw)
	p.execution(r.ExecutionMetadata)
	return nil
}

// stream prints where a stream's bytes are.
func (p *printer) stream(name string, fn digest.Function, m *repb.Digest, raw []byte) {
	switch {
	case m != nil:
		p.line(name, "%s", digestText(fn, m))
	case len(raw) > 0:
		p.line(name, "%d bytes, in the result itself", len(raw))
	}
}

func (p *printer) execution(m *repb.ExecutedActionMetadata) {
	if m == nil {
		return
	}
	if m.Worker != "" {
		p.line("worker", "%s", plain(m.Worker))
	}
	if m.QueuedTimestamp != nil {
		p.line("queued", "%s", m.QueuedTimestamp.AsTime().Format("2006-01-02T15:04:05.000Z07:00"))
	}
	for _, step := range []struct {
		name       string
		start, end *timestamppb.Timestamp
	}{
		{"in_queue", m.QueuedTimestamp, m.WorkerStartTimestamp},
		{"fetching_inputs", m.InputFetchStartTimestamp, m.InputFetchCompletedTimestamp},
		{"executing", m.ExecutionStartTimestamp, m.ExecutionCompletedTimestamp},
		{"uploading_outputs", m.OutputUploadStartTimestamp, m.OutputUploadCompletedTimestamp},
	} {
		if step.start != nil && step.end != nil {
			p.line(step.name, "%s", step.end.AsTime().Sub(step.start.AsTime()))
		}
	}
}

// plain is text on one line: what is not printable is quoted as in Go.
func plain(s string) string {
	if isPrintable(s) {
		return s
	}
	return strconv.Quote(s)
}

func isPrintable(s string) bool {
	if !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if !strconv.IsPrint(r) {
			return false
		}
	}
	return true
}

// shellWord is s as a shell reads it, on one line where that can be.
func shellWord(s string) string {
	const safe = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%+=:,./_-"
	switch {
	case s != "" && strings.Trim(s, safe) == "":
		return s
	case isPrintable(s):
		return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
	default:
		return "$" + "'" + ansiQuote(s) + "'"
	}
}

// ansiQuote is s within $'...', as bash and others read it.
func ansiQuote(s string) string {
	var b strings.Builder
	for i := range len(s) {
		switch c := s[i]; {
		case c == '\n':
			b.WriteString(`\n`)
		case c == '\t':
			b.WriteString(`\t`)
		case c == '\'' || c == '\\':
			b.WriteByte('\\')
			b.WriteByte(c)
		case c < 0x20 || c >= 0x7f:
			fmt.Fprintf(&b, `\x%02x`, c)
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}
