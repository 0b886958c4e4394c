//go:build linux

package worker_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	codepb "google.golang.org/genproto/googleapis/rpc/code"

	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/image"
	"github.com/mettle-build/mettle/mettle/worker/runner/runnertest"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// images is a registry on this machine, and a cache of its images.
type images struct {
	host  string
	away  atomic.Bool
	calls atomic.Int32
	cache *image.Cache
}

func newImages(t testing.TB, o image.Options) *images {
	t.Helper()
	im := &images{}
	handler := registry.New(registry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		im.calls.Add(1)
		if im.away.Load() {
			http.Error(w, "away", http.StatusServiceUnavailable)
			return
		}
		handler.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	im.host = strings.TrimPrefix(s.URL, "http://")
	o.Dir, o.Registries = filepath.Join(t.TempDir(), "images"), []string{im.host}
	var err error
	if im.cache, err = image.New(o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := im.cache.Close(); err != nil {
			t.Error(err)
		}
	})
	return im
}

// push pushes an image that has a shell, and files, and returns its reference.
func (im *images) push(t testing.TB, repo string, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	runnertest.CopyPrograms(t, dir, "sh", "ls", "cat", "id")
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := w.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		t.Fatal(err)
	}
	// What an image says of how it is run is of no account here.
	if img, err = mutate.Config(img, v1.Config{Env: []string{"FROM_IMAGE=yes"}, WorkingDir: "/bin", Entrypoint: []string{"/bin/false"}, User: "nobody"}); err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag(im.host + "/" + repo)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(tag, img); err != nil {
		t.Fatal(err)
	}
	h, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return "docker://" + im.host + "/" + repo + "@" + h.String()
}

// inImages gives actions the images, or skips the test where that can't be.
func inImages(t testing.TB, im *images) change {
	t.Helper()
	if err := worker.TryImages(t.TempDir()); err != nil {
		t.Skipf("this machine does not allow images: %v", err)
	}
	return func(o *worker.Options, _ *mem.Options) { o.Isolation, o.Images = worker.Namespaces, im.cache }
}

func asking(ref string) *repb.Action {
	return &repb.Action{DoNotCache: true, Platform: &repb.Platform{Properties: []*repb.Platform_Property{{Name: "container-image", Value: ref}}}}
}

func TestWorker_images(t *testing.T) {
	im := newImages(t, image.Options{})
	a, b := im.push(t, "a", map[string]string{"opt/name": "a", "etc/os-release": "A"}), im.push(t, "b", map[string]string{"opt/name": "b"})
	f := newFixture(t, inImages(t, im)).start(t)
	script := "cat /opt/name in; echo out > out; echo t > /tmp/x; ls -A /tmp; echo ${FROM_IMAGE-clean}; pwd; test ! -e " + f.dir
	for range 2 {
		for name, ref := range map[string]string{"a": a, "b": b} {
			r := f.run(t, request{
				action:  asking(ref),
				root:    &repb.Directory{Files: []*repb.FileNode{{Name: "in", Digest: f.put(t, "input")}}},
				command: &repb.Command{OutputPaths: []string{"out"}},
				script:  script,
			}, 0)
			if got, want := string(r.StdoutRaw), name+"inputx\nclean\n/build\n"; got != want {
				t.Errorf("stdout %q, want %q", got, want)
			}
			if len(r.OutputFiles) != 1 || f.read(t, r.OutputFiles[0].Digest) != "out\n" {
				t.Errorf("outputs %v", r.OutputFiles)
			}
			checkMetadata(t, r.ExecutionMetadata)
		}
		// Between them, the machine's own.
		f.run(t, request{script: "test ! -e /opt/name -a -e /etc/passwd"}, 0)
		f.run(t, request{action: asking("none"), script: "test -e /etc/passwd"}, 0)
	}
	calls := im.calls.Load()
	f.run(t, request{action: asking(a), script: "true"}, 0)
	if n := im.calls.Load() - calls; n > 0 {
		t.Errorf("%d calls of the registry for an image that is there", n)
	}
}

func TestWorker_images_refused(t *testing.T) {
	im := newImages(t, image.Options{})
	ref := im.push(t, "a", nil)
	f := newFixture(t, inImages(t, im)).start(t)
	unknown := ref[:len(ref)-4] + "0000"
	for name, tc := range map[string]struct {
		ref  string
		code codepb.Code
		says string
	}{
		"no such image":    {unknown, codepb.Code_FAILED_PRECONDITION, unknown},
		"no such registry": {"docker://registry.invalid/a@" + strings.SplitN(ref, "@", 2)[1], codepb.Code_INVALID_ARGUMENT, "does not allow images of registry.invalid"},
		"tag":              {"docker://" + im.host + "/a:latest", codepb.Code_INVALID_ARGUMENT, "@sha256"},
		"nonsense":         {"ubuntu", codepb.Code_INVALID_ARGUMENT, "docker://"},
	} {
		t.Run(name, func(t *testing.T) {
			resp := f.execute(t, request{action: asking(tc.ref), script: "true"})
			if codepb.Code(resp.GetStatus().GetCode()) != tc.code || !strings.Contains(resp.GetStatus().GetMessage(), tc.says) || len(resp.GetStatus().GetDetails()) > 0 {
				t.Errorf("status %v, want %v and %q", resp.GetStatus(), tc.code, tc.says)
			}
		})
	}
	f.run(t, request{action: asking(ref), script: "true"}, 0)
}

// While a registry is away, its images fail, and nothing else does.
func TestWorker_images_registryAway(t *testing.T) {
	im := newImages(t, image.Options{})
	ref := im.push(t, "a", nil)
	f := newFixture(t, inImages(t, im), func(o *worker.Options, q *mem.Options) { o.Slots, q.MaxAttempts = 1, 2 }).start(t)
	im.away.Store(true)
	resp := f.execute(t, request{action: asking(ref), script: "true"})
	if s := resp.GetStatus(); s.GetCode() == 0 || !strings.Contains(s.GetMessage(), "attempt 2") || !strings.Contains(s.GetMessage(), ref) || !strings.Contains(s.GetMessage(), "503") {
		t.Errorf("status %v, want the image's name and what is wrong, after two attempts", s)
	}
	if err := f.worker.Ready(); err != nil {
		t.Errorf("the worker takes no jobs: %v", err)
	}
	f.run(t, request{script: "true"}, 0)
	im.away.Store(false)
	f.run(t, request{action: asking(ref), script: "true"}, 0)
}

func TestWorker_images_tag(t *testing.T) {
	im := newImages(t, image.Options{Tags: true})
	ref := im.push(t, "a", nil)
	f := newFixture(t, inImages(t, im)).start(t)
	resp := f.execute(t, request{action: asking("docker://" + im.host + "/a:latest"), script: "true"})
	if digest := strings.SplitN(ref, "@", 2)[1]; resp.GetStatus().GetCode() != 0 || !strings.Contains(resp.GetMessage(), digest) {
		t.Errorf("status %v, message %q, want %s in it", resp.GetStatus(), resp.GetMessage(), digest)
	}
}

// What the operator says that the machine is, it is.
func TestWorker_images_declared(t *testing.T) {
	im := newImages(t, image.Options{})
	const ref = "docker://registry.invalid/this/machine"
	f := newFixture(t, inImages(t, im), func(o *worker.Options, _ *mem.Options) {
		o.Properties = []platform.Property{{Name: "container-image", Value: "*"}, {Name: "container-image", Value: ref}}
	}).start(t)
	f.run(t, request{action: asking(ref), script: "test -e /etc/passwd"}, 0)
}

// The cache holds one image only: those that slots are ready to run in have to go.
func TestWorker_images_moreThanRoom(t *testing.T) {
	probe := newImages(t, image.Options{})
	ref := probe.push(t, "a", nil)
	r, err := probe.cache.Parse(ref)
	if err != nil {
		t.Fatal(err)
	}
	img, err := probe.cache.Open(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	size := int64(0)
	for _, l := range img.Layers {
		if err := filepath.Walk(l, func(_ string, st os.FileInfo, err error) error {
			size += (st.Size()+4095)/4096*4096 + 4096
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	img.Close()
	im := newImages(t, image.Options{MaxBytes: size * 3 / 2})
	f := newFixture(t, inImages(t, im)).start(t)
	refs := map[string]string{"1": im.push(t, "a", map[string]string{"n": "1"}), "2": im.push(t, "b", map[string]string{"n": "2"}), "3": im.push(t, "c", map[string]string{"n": "3"})}
	for range 2 {
		for n, ref := range refs {
			if got := f.run(t, request{action: asking(ref), script: "cat /n"}, 0); string(got.StdoutRaw) != n {
				t.Errorf("in image %s: %q", n, got.StdoutRaw)
			}
		}
	}
}

// BenchmarkExecute_image is one action after the other in an image, beside the same
// on the machine's own file system, in a sandbox both: the program is the same.
func BenchmarkExecute_image(b *testing.B) {
	im := newImages(b, image.Options{})
	ref := im.push(b, "a", nil)
	command := &repb.Command{Arguments: []string{"/bin/sh", "-c", ":"}}
	for name, action := range map[string]*repb.Action{"own": {DoNotCache: true}, "kept": asking(ref)} {
		b.Run(name, func(b *testing.B) {
			f := newFixture(b, inImages(b, im))
			f.bench(b, request{command: command, action: action})
		})
	}
	// Each action in another image than the last ones: its runner is made anew.
	b.Run("another", func(b *testing.B) {
		f := newFixture(b, inImages(b, im))
		e, err := worker.NewBenchExecutor(b.Context(), f.opts)
		if err != nil {
			b.Fatal(err)
		}
		defer e.Close()
		var jobs []*queuepb.Job
		for i := range 6 {
			ref := im.push(b, fmt.Sprint("b", i), map[string]string{"n": fmt.Sprint(i)})
			job := f.makeJob(b, request{command: command, action: asking(ref)})
			if _, err := e.Execute(b.Context(), job); err != nil { // the image is pulled
				b.Fatal(err)
			}
			jobs = append(jobs, job)
		}
		for i := 0; b.Loop(); i++ {
			resp, err := e.Execute(b.Context(), jobs[i%len(jobs)])
			if err != nil || resp.Status.GetCode() != 0 || resp.Result.GetExitCode() != 0 {
				b.Fatal(resp, err)
			}
		}
	})
}
