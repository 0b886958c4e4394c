package e2e_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/creds/credstest"
	"github.com/mettle-build/mettle/elan/digest"
)

// A moon is one clone of a workspace of moon's, a build tool written in Rust that keeps
// outputs in a remote cache.
type moon struct {
	t    *testing.T
	dir  string
	home string
	env  []string
}

func needMoon(t *testing.T) {
	t.Helper()
	for _, program := range []string{"moon", "git"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("no %s here; moon is in the npm package @moonrepo/cli", program)
		}
	}
}

// newMoon makes a clone. In home moon keeps plugins that it has compiled, and no outputs.
// The remote is what stands in its configuration below "remote:".
func newMoon(t *testing.T, home string, remote ...string) *moon {
	t.Helper()
	m := &moon{t: t, dir: t.TempDir(), home: home}
	large := make([]byte, 6<<20) // beyond a batch: it goes by ByteStream
	random := rand.NewChaCha8([32]byte{})
	for i := 0; i < len(large); i += 1 << 10 {
		_, _ = random.Read(large[i : i+512]) // the other half compresses
	}
	for path, text := range map[string]string{
		".moon/workspace.yml": "projects:\n  app: app\nremote:\n  " + strings.Join(remote, "\n  ") + "\n",
		"app/moon.yml":        "tasks:\n  build: {command: sh build.sh, inputs: [build.sh, large.in], outputs: [out]}\n  fail: {command: sh fail.sh, outputs: [out]}\n",
		"app/build.sh":        "echo marker-of-a-run; mkdir -p out/sub; cp large.in out/large; echo small >out/sub/tool; chmod +x out/sub/tool\n",
		"app/fail.sh":         "echo marker-of-a-failure; exit 3\n",
		"app/large.in":        string(large),
	} {
		path = filepath.Join(m.dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
			t.Fatal(err)
		}
		credstest.Write(t, filepath.Dir(path), filepath.Base(path), text)
	}
	for _, args := range [][]string{
		{"init", "-q"},
		{"add", "-A"},
		{"-c", "user.name=test", "-c", "user.email=test@example.com", "commit", "-q", "-m", "all"},
	} {
		if out, err := exec.CommandContext(t.Context(), "git", append([]string{"-C", m.dir}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v\n%s", args, err, out)
		}
	}
	return m
}

// Run runs a task, and returns what was printed.
func (m *moon) Run(task string) (string, error) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), bazelTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "moon", "--log=debug", "run", "app:"+task)
	cmd.Dir = m.dir
	// On a machine that builds for others moon leaves a cache on this machine alone.
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); name != "CI" && !strings.HasPrefix(name, "MOON_") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Env = append(cmd.Env, "HOME="+m.home, "MOON_TELEMETRY=false", "MOON_TOOLCHAIN_FORCE_GLOBALS=true")
	cmd.Env = append(cmd.Env, m.env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Build runs the task that has outputs, and looks at them.
func (m *moon) Build() string {
	m.t.Helper()
	out, err := m.Run("build")
	if err != nil {
		m.t.Fatalf("moon run app:build: %v\n%s", err, out)
	}
	want, err := os.ReadFile(filepath.Join(m.dir, "app/large.in"))
	if err != nil {
		m.t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(m.dir, "app/out/large")); err != nil || !bytes.Equal(got, want) {
		m.t.Errorf("the large output: %d bytes, %v, want the %d of the input", len(got), err, len(want))
	}
	info, err := os.Stat(filepath.Join(m.dir, "app/out/sub/tool"))
	if err != nil || info.Mode()&0o100 == 0 {
		m.t.Errorf("the executable output: %v, %v", info, err)
	}
	return out
}

// removeBlob makes a server lose what it has stored.
func removeBlob(t *testing.T, s *server, data string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), binary(t, "elan"), "rm", "--remote="+s.Addr(), digest.Of(digest.SHA256, []byte(data)).String())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("elan rm: %v\n%s", err, out)
	}
}

const moonHit = "cached from remote"

// TestMoon keeps the outputs of moon's tasks, plain and compressed, and with them for
// colleagues who have nothing yet; without a server it builds all the same.
func TestMoon(t *testing.T) {
	needMoon(t)
	home := t.TempDir()
	s := startElan(t, "file://"+t.TempDir())
	for name, compression := range map[string]string{"plain": "none", "zstd": "zstd"} {
		t.Run(name, func(t *testing.T) {
			remote := []string{
				"api: grpc", "host: grpc://" + s.Addr(),
				"cache: {instanceName: moon-" + name + ", compression: " + compression + ", verifyIntegrity: true}",
			}
			if out := newMoon(t, home, remote...).Build(); strings.Contains(out, moonHit) || strings.Contains(out, "ERROR") {
				t.Errorf("the first build:\n%s", out)
			}
			if out := newMoon(t, home, remote...).Build(); !strings.Contains(out, moonHit) || !strings.Contains(out, "marker-of-a-run") {
				t.Errorf("a colleague's build, which should be a hit:\n%s", out)
			}
			// An output that the storage has lost is made again.
			removeBlob(t, s, "small\n")
			if out := newMoon(t, home, remote...).Build(); strings.Contains(out, moonHit) || !strings.Contains(out, "marker-of-a-run") {
				t.Errorf("a build after a blob was lost:\n%s", out)
			}
			for range 2 {
				out, err := newMoon(t, home, remote...).Run("fail")
				if err == nil || !strings.Contains(out, "marker-of-a-failure") || strings.Contains(out, moonHit) {
					t.Errorf("a task that fails: %v\n%s", err, out)
				}
			}
		})
	}
	s.Kill()
	newMoon(t, home, "api: grpc", "host: grpc://"+s.Addr()).Build()
}

// TestMoon_trust shows the server who calls: by TLS with a token, and by a client
// certificate.
func TestMoon_trust(t *testing.T) {
	needMoon(t)
	home, tr := t.TempDir(), newTrust(t)
	tr.ca.Issue(tr.dir, "worker", credstest.Client("worker-1"))
	s := newServer(t, "mettle", append([]string{"dual", "--dir=" + storeDir(t), tr.policy}, tr.tls...))
	s.args = append(s.args, "--port="+strconv.Itoa(s.Port))
	s.says = "grpcs://"
	s.Start()
	for name, tc := range map[string]struct {
		remote, env []string
	}{
		"token": {
			[]string{"tls: {cert: certs/ca.pem}", "auth: {token: BUILD_TOKEN}"},
			[]string{"BUILD_TOKEN=api-0123456789abcdef"},
		},
		"certificate": {[]string{"mtls: {caCert: certs/ca.pem, clientCert: certs/worker.pem, clientKey: certs/worker.key}"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			for _, want := range []bool{false, true} {
				m := newMoon(t, home, append([]string{"api: grpc", "host: grpcs://" + s.Addr(), "cache: {instanceName: " + name + "}"}, tc.remote...)...)
				m.env = tc.env
				if err := os.CopyFS(filepath.Join(m.dir, "certs"), os.DirFS(tr.dir)); err != nil {
					t.Fatal(err)
				}
				if out := m.Build(); strings.Contains(out, moonHit) != want {
					t.Errorf("a build that should be a hit %t:\n%s", want, out)
				}
			}
		})
	}
}
