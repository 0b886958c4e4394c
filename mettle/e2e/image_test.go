//go:build linux

package e2e_test

import (
	"archive/tar"
	"bytes"
	"io"
	"log/slog"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	codepb "google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/runner/runnertest"
)

// pushImage pushes an image to a registry on this machine that has a shell and a
// file, and returns its reference and the registry.
func pushImage(t *testing.T, repo, text string) (ref string, s *httptest.Server) {
	t.Helper()
	dir := t.TempDir()
	runnertest.CopyPrograms(t, dir, "sh", "cat")
	if err := os.WriteFile(filepath.Join(dir, "which"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
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
	h, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	s = httptest.NewServer(registry.New(registry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo))))
	t.Cleanup(s.Close)
	host := strings.TrimPrefix(s.URL, "http://")
	tag, err := name.NewTag(host + "/" + repo)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(tag, img); err != nil {
		t.Fatal(err)
	}
	return "docker://" + host + "/" + repo + "@" + h.String(), s
}

// inImage runs a script in an image.
func inImage(t *testing.T, conn *grpc.ClientConn, ref, script string) *repb.ExecuteResponse {
	t.Helper()
	return execute(t, conn, "", putInImage(t, conn, ref, script))
}

// putInImage stores the action of a script in an image.
func putInImage(t *testing.T, conn *grpc.ClientConn, ref, script string) digest.Digest {
	t.Helper()
	store, err := client.New(client.Options{Conn: conn})
	if err != nil {
		t.Fatal(err)
	}
	put := func(d digest.Digest, err error) *repb.Digest {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return d.Proto()
	}
	command := put(blob.PutMessage(t.Context(), store, digest.SHA256, &repb.Command{Arguments: []string{"sh", "-c", script}, OutputPaths: []string{"out"}}))
	root := put(blob.PutMessage(t.Context(), store, digest.SHA256, &repb.Directory{}))
	d, err := blob.PutMessage(t.Context(), store, digest.SHA256, &repb.Action{
		CommandDigest: command, InputRootDigest: root, DoNotCache: true,
		Platform: &repb.Platform{Properties: []*repb.Platform_Property{{Name: "container-image", Value: ref}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestImages: an action runs in the image that it asks for, also after the
// server was killed, and when the registry is no longer there.
func TestImages(t *testing.T) {
	if err := worker.TryImages(t.TempDir()); err != nil {
		t.Skipf("this machine does not allow images: %v", err)
	}
	ref, reg := pushImage(t, "some/image", "the image's\n")
	host := strings.TrimPrefix(reg.URL, "http://")
	s := startDual(t, storeDir(t), "--image_registries="+host)
	connect := func(s *server) *grpc.ClientConn {
		t.Helper()
		conn, err := client.Dial(t.Context(), s.Addr())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	check := func(s *server) {
		t.Helper()
		resp := inImage(t, connect(s), ref, "cat /which; echo made > out; test ! -e /etc/passwd")
		if resp.GetStatus().GetCode() != 0 || resp.GetResult().GetExitCode() != 0 || string(resp.GetResult().GetStdoutRaw()) != "the image's\n" || len(resp.GetResult().GetOutputFiles()) != 1 {
			t.Errorf("response %v", resp)
		}
	}
	check(s)
	resp := inImage(t, connect(s), "docker://registry.invalid/a"+ref[strings.Index(ref, "@"):], "true")
	if codepb.Code(resp.GetStatus().GetCode()) != codepb.Code_INVALID_ARGUMENT || !strings.Contains(resp.GetStatus().GetMessage(), "registry.invalid") {
		t.Errorf("an image that is not allowed: %v", resp.GetStatus())
	}
	t.Run("fleet", func(t *testing.T) {
		f := newFleet(t)
		w := f.worker(1)
		w.args = append(w.args, "--image_registries="+host)
		for _, s := range []*server{f.broker, f.elan, f.api, w} {
			s.Start()
		}
		check(f.api)
	})
	t.Run("one", func(t *testing.T) {
		d := putInImage(t, connect(s), ref, "cat /which; test ! -e /etc/passwd")
		cmd := exec.CommandContext(t.Context(), binary(t, "mettle"), "one", d.String(), "--remote="+s.Addr(), "--dir="+storeDir(t), "--image_registries="+host)
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "the image's\n") {
			t.Errorf("%v: %s", err, out)
		}
	})
	s.Kill()
	reg.Close()
	s.Start()
	check(s)
}
