package e2e_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mettle-build/mettle/creds/credstest"
)

// A bst is one BuildStream client with a project, of one element that imports files.
type bst struct {
	t         *testing.T
	dir, home string
}

func needBst(t *testing.T) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "bst", "--version").CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "1.") {
		t.Skipf("no BuildStream 1 here: %v; on Debian: apt-get install buildstream", err)
	}
}

// newBst makes a project whose artifacts are where the lines of YAML say.
func newBst(t *testing.T, artifacts ...string) *bst {
	t.Helper()
	b := &bst{t: t, dir: t.TempDir(), home: t.TempDir()}
	for path, text := range map[string]string{
		"project.conf":      "name: trial\nelement-path: elements\nartifacts:\n- " + strings.Join(artifacts, "\n  ") + "\n",
		"elements/data.bst": "kind: import\nsources:\n- kind: local\n  path: files\n",
		"files/text":        "some text\n",
		"files/empty":       "",
		"files/large":       strings.Repeat("beyond what fits in a batch\n", 1<<17),
		"files/bin/tool":    "#!/bin/sh\n",
	} {
		path = filepath.Join(b.dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
			t.Fatal(err)
		}
		credstest.Write(t, filepath.Dir(path), filepath.Base(path), text)
	}
	if err := os.Chmod(filepath.Join(b.dir, "files/bin/tool"), 0o755); err != nil { //nolint:gosec // a test's
		t.Fatal(err)
	}
	if err := os.Symlink("text", filepath.Join(b.dir, "files/link")); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bst) Run(args ...string) (string, error) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), bazelTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bst", append([]string{"--no-interactive", "--no-colors"}, args...)...)
	cmd.Dir = b.dir
	cmd.Env = append(os.Environ(), "HOME="+b.home, "XDG_CACHE_HOME="+b.home, "XDG_CONFIG_HOME="+b.home)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Build builds, and wants to read that the artifact went the way that want says.
func (b *bst) Build(want string) {
	b.t.Helper()
	out, err := b.Run("build", "data.bst")
	if err != nil || !strings.Contains(out, want) {
		b.t.Fatalf("bst build: %v, and no %q in\n%s", err, want, out)
	}
}

// files are path → mode and content of what was checked out.
func (b *bst) files(dir string) map[string]string {
	b.t.Helper()
	w := &bazel{t: b.t, Workspace: dir}
	if err := os.Symlink(dir, filepath.Join(dir, "bazel-bin")); err != nil {
		b.t.Fatal(err)
	}
	found := w.outputs()
	delete(found, "bazel-bin")
	return found
}

// TestBuildStream pushes an artifact, by the Remote Asset API and the CAS, and pulls
// it again; without a server BuildStream builds all the same.
func TestBuildStream(t *testing.T) {
	needBst(t)
	s := startDual(t, storeDir(t))
	remote := []string{"url: http://" + s.Addr(), "push: true"}
	first := newBst(t, remote...)
	first.Build("Pushed artifact")
	newBst(t, remote...).Build("Pulled artifact")

	// What was acknowledged is there after kill -9.
	s.Kill()
	s.Start()
	third := newBst(t, remote...)
	third.Build("Pulled artifact")
	checkout := filepath.Join(t.TempDir(), "checkout")
	if out, err := third.Run("checkout", "data.bst", checkout); err != nil {
		t.Fatalf("bst checkout: %v\n%s", err, out)
	}
	if diff := cmp.Diff(third.files(filepath.Join(third.dir, "files")), third.files(checkout)); diff != "" {
		t.Errorf("what was pulled differs (-imported +checked out):\n%s", diff)
	}

	// An artifact of which something is lost is none: it is built and pushed again.
	removeBlob(t, s, "some text\n")
	newBst(t, remote...).Build("Pushed artifact")
	newBst(t, remote...).Build("Pulled artifact")

	s.Kill()
	newBst(t, remote...).Build("SUCCESS Build")
}

// TestBuildStream_trust: BuildStream 1 knows no tokens, but client certificates; one who
// may only read pulls.
func TestBuildStream_trust(t *testing.T) {
	needBst(t)
	tr := newTrust(t)
	credstest.Write(t, tr.dir, "policy.yaml", `
identities:
  - name: builders
    certificate: {common_name: "builder-*"}
    rights: [cas:read, cas:write, ac:read, ac:write, asset:fetch]
  - name: readers
    certificate: {common_name: "reader-*"}
    rights: [cas:read, ac:read, asset:fetch]
`)
	s := newServer(t, "mettle", append([]string{"dual", "--dir=" + storeDir(t), tr.policy}, tr.tls...))
	s.args = append(s.args, "--port="+strconv.Itoa(s.Port))
	s.says = "grpcs://"
	s.Start()
	as := func(name, push string) *bst {
		cert, key := tr.ca.Issue(tr.dir, name, credstest.Client(name))
		return newBst(t, "url: https://"+s.Addr(), "push: "+push, "server-cert: "+tr.file("ca.pem"), "client-cert: "+cert, "client-key: "+key)
	}
	as("reader-1", "false").Build("does not have")
	if out, err := as("reader-2", "true").Run("build", "data.bst"); err == nil && strings.Contains(out, "Pushed artifact") {
		t.Errorf("one who may only read has pushed:\n%s", out)
	}
	as("builder-1", "true").Build("Pushed artifact")
	as("reader-3", "false").Build("Pulled artifact")
}
