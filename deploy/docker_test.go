package deploy_test

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// dockerfile is what the last stage of one says, and what the first one builds.
type dockerfile struct {
	packages   map[string]string // by where the first stage puts the program
	base       string
	copies     []copied
	user       string
	ports      []string
	entrypoint []string
}

type copied struct {
	stage, owner string
	from         []string
	to           string
}

// readDockerfile reads the instructions that ours have, and refuses others.
func readDockerfile(t *testing.T, name string) dockerfile {
	t.Helper()
	text := strings.ReplaceAll(string(read(t, name)), "\\\n", "")
	d := dockerfile{packages: map[string]string{}}
	stages := 0
	for line := range strings.Lines(text) {
		word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		fields := strings.Fields(rest)
		switch {
		case word == "" || word[0] == '#' || word == "ARG" || word == "WORKDIR":
		case word == "FROM":
			stages++
			d.base = fields[0]
		case stages == 1 && word == "RUN":
			if i := slices.Index(fields, "-o"); i >= 0 {
				if !strings.HasPrefix(rest, "CGO_ENABLED=0 go build ") {
					t.Errorf("%s: %s does not build a static program", name, rest)
				}
				d.packages[fields[i+1]] = fields[i+2]
			}
		case stages == 1 && word == "COPY":
		case stages == 2 && word == "COPY":
			var c copied
			for strings.HasPrefix(fields[0], "--") {
				flag, value, _ := strings.Cut(fields[0], "=")
				switch flag {
				case "--from":
					c.stage = value
				case "--chown":
					c.owner = value
				default:
					t.Fatalf("%s: COPY has no %s here", name, flag)
				}
				fields = fields[1:]
			}
			c.from, c.to = fields[:len(fields)-1], fields[len(fields)-1]
			d.copies = append(d.copies, c)
		case stages == 2 && word == "USER":
			d.user = rest
		case stages == 2 && word == "EXPOSE":
			d.ports = fields
		case stages == 2 && word == "ENTRYPOINT":
			if err := json.Unmarshal([]byte(rest), &d.entrypoint); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		default:
			t.Fatalf("%s: this test knows no %q in stage %d", name, line, stages)
		}
	}
	return d
}

// image makes an OCI image of what the Dockerfile's last stage says, without a base.
func (d dockerfile) image(t *testing.T) v1.Image {
	t.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, c := range d.copies {
		uid, gid := 0, 0
		if c.owner != "" {
			if _, err := fmt.Sscanf(c.owner, "%d:%d", &uid, &gid); err != nil {
				t.Fatalf("--chown=%s: %v", c.owner, err)
			}
		}
		for _, from := range c.from {
			h := &tar.Header{Name: strings.TrimPrefix(c.to, "/"), Typeflag: tar.TypeReg, Mode: 0o644, Uid: uid, Gid: gid}
			var data []byte
			switch {
			case c.stage == "" && strings.HasSuffix(c.to, "/"):
				h.Name = strings.TrimPrefix(path.Join(c.to, path.Base(from)), "/")
				data = read(t, filepath.Join("..", from))
			case strings.HasSuffix(from, "/"): // an empty directory
				h.Typeflag, h.Mode = tar.TypeDir, 0o755
			case d.packages[from] != "":
				h.Mode = 0o755
				data = read(t, program(t, path.Base(d.packages[from])))
			case from == "/etc/ssl/certs/ca-certificates.crt":
				// golang:1.26 has it; what is in it does not matter here.
				data = []byte("# authorities\n")
			default:
				t.Fatalf("COPY of %s, which nothing makes", from)
			}
			h.Size = int64(len(data))
			if err := errors.Join(w.WriteHeader(h), errOf(w.Write(data))); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		t.Fatal(err)
	}
	img, err = mutate.Config(img, v1.Config{User: d.user, Entrypoint: d.entrypoint})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func errOf(_ int, err error) error { return err }

// unpack puts an image's file system in a directory, with its owners if root does.
func unpack(t *testing.T, img v1.Image) string {
	t.Helper()
	root, err := os.MkdirTemp("", "deploy-root-") //nolint:usetesting // t.TempDir is below a directory that only root enters
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(root) })
	if err := os.Chmod(root, 0o755); err != nil { //nolint:gosec // it is a root directory
		t.Fatal(err)
	}
	files := mutate.Extract(img)
	defer files.Close()
	for r := tar.NewReader(files); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return root
		}
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(root, filepath.Clean("/"+h.Name))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil { //nolint:gosec // as a container engine does
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeDir {
			err = os.MkdirAll(name, 0o755) //nolint:gosec // likewise
		} else {
			var data []byte
			if data, err = io.ReadAll(r); err == nil {
				err = os.WriteFile(name, data, os.FileMode(h.Mode)) //nolint:gosec // likewise
			}
		}
		if err == nil && os.Geteuid() == 0 {
			err = os.Chown(name, h.Uid, h.Gid)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// contained is a command inside an unpacked image, as its user, with its
// entrypoint. It skips where that takes root.
func contained(t *testing.T, root string, img v1.Image, args ...string) *exec.Cmd {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("chroot and another user take root")
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	var uid, gid uint32
	if _, err := fmt.Sscanf(c.Config.User, "%d:%d", &uid, &gid); err != nil || uid == 0 {
		t.Fatalf("got user %q, want numbers of somebody but root: %v", c.Config.User, err)
	}
	entry := c.Config.Entrypoint
	cmd := exec.CommandContext(t.Context(), entry[0], append(entry[1:], args...)...)
	cmd.Dir, cmd.Env = "/", []string{}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	return cmd
}

func TestDocker(t *testing.T) {
	for name, want := range map[string]struct {
		base, binary string
		ports        []string
	}{
		"elan":   {"scratch", "elan", []string{portOf(t, "elan", "serve", "--port"), portOf(t, "elan", "serve", "--http_port")}},
		"api":    {"scratch", "mettle", []string{portOf(t, "mettle", "api", "--port"), portOf(t, "mettle", "api", "--http_port")}},
		"worker": {"${BASE}", "mettle", []string{portOf(t, "mettle", "worker", "--http_port")}},
	} {
		t.Run(name, func(t *testing.T) {
			d := readDockerfile(t, "docker/Dockerfile."+name)
			if d.base != want.base || !slices.Equal(d.ports, want.ports) || len(d.entrypoint) != 1 {
				t.Errorf("got base %s, ports %v, entrypoint %v; want %+v", d.base, d.ports, d.entrypoint, want)
			}
			img := d.image(t)
			root := unpack(t, img)
			binary := filepath.Join(root, d.entrypoint[0])
			if filepath.Base(binary) != want.binary {
				t.Errorf("got entrypoint %s, want %s", d.entrypoint, want.binary)
			}
			checkStatic(t, binary)
			out, err := contained(t, root, img, "--help").CombinedOutput()
			if err != nil || !bytes.HasPrefix(out, []byte("Usage: "+want.binary+" ")) {
				t.Errorf("--help: %v: %.200s", err, out)
			}
		})
	}
}

// checkStatic sees that a program asks for no loader, which scratch has none of.
func checkStatic(t *testing.T, binary string) {
	t.Helper()
	f, err := elf.Open(binary)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			t.Errorf("%s is not static", binary)
		}
	}
}

// TestDocker_serves runs the image of the storage with the arguments and the policy of
// the Kubernetes manifest, on other ports.
func TestDocker_serves(t *testing.T) {
	img := readDockerfile(t, "docker/Dockerfile.elan").image(t)
	root := unpack(t, img)
	c := buildOverlay(t, "nats-s3")
	mountManifest(t, root, c)
	admin := freePort(t)
	args := append(slices.Clone(c["Deployment/elan"].workload.Spec.Template.Spec.Containers[0].Args),
		"--storage=file:///var/cache/elan", "--port=0", "--http_port="+strconv.Itoa(admin))
	cmd := contained(t, root, img, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for ready := false; !ready; {
		select {
		case err := <-ended:
			t.Fatalf("it ended: %v: %s", err, out.String())
		case <-ctx.Done():
			_ = cmd.Process.Kill()
			if err := <-ended; err == nil {
				t.Error("it ended well")
			}
			t.Fatalf("it does not serve: %s", out.String())
		case <-time.After(50 * time.Millisecond):
			ready = answers(ctx, t, admin)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("after SIGTERM: %v: %s", err, out.String())
	}
}

func answers(ctx context.Context, t *testing.T, port int) bool {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/healthz", port), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	_ = resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// freePort is a port that nobody listens on now.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port //nolint:forcetypeassert // it is tcp
}
