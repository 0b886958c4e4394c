//go:build linux

package output_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/worker/output"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// counting is a store elsewhere, and counts how often it is asked.
type counting struct {
	blob.Store
	finds, creates atomic.Int64
}

func (c *counting) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	c.finds.Add(1)
	return c.Store.FindMissing(ctx, ds)
}

func (c *counting) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	c.creates.Add(1)
	return c.Store.Create(ctx, d)
}

func remote(t testing.TB) blob.Store {
	t.Helper()
	s, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return &counting{Store: s}
}

func local(t testing.TB) blob.Store {
	t.Helper()
	s, err := file.New(file.Options{Dir: filepath.Join(t.TempDir(), "store")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// each runs test with both kinds of store.
func each(t *testing.T, test func(t *testing.T, f *fixture)) {
	for name, newStore := range map[string]func(testing.TB) blob.Store{"remote": remote, "local": local} {
		t.Run(name, func(t *testing.T) { test(t, newFixture(t, newStore(t), output.Options{MaxUploads: 1})) })
	}
}

type fixture struct {
	store     blob.Store
	collector *output.Collector
	root      string
	fn        digest.Function
}

func newFixture(t testing.TB, store blob.Store, o output.Options) *fixture {
	t.Helper()
	o.Store = store
	c, err := output.New(o)
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{store: store, collector: c, root: filepath.Join(t.TempDir(), "root"), fn: digest.SHA256}
	if err := os.Mkdir(f.root, 0o755); err != nil { //nolint:gosec // as input roots are
		t.Fatal(err)
	}
	return f
}

// write makes files, with a mode before a colon where it matters.
func (f *fixture) write(t testing.TB, files map[string]string) {
	t.Helper()
	for name, data := range files {
		mode := os.FileMode(0o644)
		if n, ok := strings.CutPrefix(name, "x:"); ok {
			name, mode = n, 0o755
		}
		path := filepath.Join(f.root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // as input roots are
			t.Fatal(err)
		}
		if target, ok := strings.CutPrefix(data, "-> "); ok {
			if err := os.Symlink(target, path); err != nil {
				t.Fatal(err)
			}
		} else if err := os.WriteFile(path, []byte(data), mode); err != nil {
			t.Fatal(err)
		}
	}
}

func (f *fixture) collect(t testing.TB, c *repb.Command) (*output.Collected, error) {
	t.Helper()
	return f.collector.Collect(t.Context(), output.Request{Root: f.root, Command: c, Function: f.fn})
}

func (f *fixture) mustCollect(t testing.TB, c *repb.Command) *output.Collected {
	t.Helper()
	got, err := f.collect(t, c)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func (f *fixture) digest(s string) *repb.Digest { return digest.Of(f.fn, []byte(s)).Proto() }

func (f *fixture) messageDigest(t testing.TB, m proto.Message) *repb.Digest {
	t.Helper()
	d, _, err := digest.OfMessage(f.fn, m)
	if err != nil {
		t.Fatal(err)
	}
	return d.Proto()
}

func (f *fixture) read(t testing.TB, d *repb.Digest) []byte {
	t.Helper()
	dd, err := digest.FromProto(f.fn, d)
	if err != nil {
		t.Fatal(err)
	}
	data, err := blob.ReadAll(t.Context(), f.store, dd, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	return data
}
