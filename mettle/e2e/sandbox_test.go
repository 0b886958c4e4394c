package e2e_test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// putActionIn is putAction for an action with platform properties, NAME=VALUE.
func putActionIn(t *testing.T, s blob.Store, script string, properties ...string) digest.Digest {
	t.Helper()
	a := &repb.Action{}
	if err := blob.ReadMessage(t.Context(), s, putAction(t, s, script), 1<<20, a); err != nil {
		t.Fatal(err)
	}
	a.Platform = &repb.Platform{}
	for _, p := range properties {
		name, value, _ := strings.Cut(p, "=")
		a.Platform.Properties = append(a.Platform.Properties, &repb.Platform_Property{Name: name, Value: value})
	}
	d, err := blob.PutMessage(t.Context(), s, digest.SHA256, a)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// outputOf runs an action that has to succeed.
func outputOf(t *testing.T, c connected, d digest.Digest) string {
	t.Helper()
	resp := execute(t, c.conn, "", d)
	if resp.GetStatus().GetCode() != 0 || resp.GetResult().GetExitCode() != 0 {
		t.Fatalf("%v", resp)
	}
	return string(resp.GetResult().GetStdoutRaw())
}

// needsSandbox skips the test where dual says that this machine allows none.
func needsSandbox(t *testing.T, s *server) {
	t.Helper()
	if strings.Contains(s.log.String(), "NOT isolated") {
		t.Skip("this machine allows no sandbox")
	}
}

// What an action can reach of the network is what it asks for and the operator allows.
func TestDual_network(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	connect := "bash -c 'exec 3<>/dev/tcp/127.0.0.1/" + port + "' && echo reached || echo no way"
	t.Run("allowed", func(t *testing.T) {
		s := startDual(t, storeDir(t), "--allow_network")
		needsSandbox(t, s)
		c := s.client(t)
		for property, want := range map[string]string{"network=external": "reached\n", "network=none": "no way\n", "network=": "no way\n", "OSFamily=linux": "no way\n"} {
			if got := outputOf(t, c, putActionIn(t, c.client, connect, property)); got != want {
				t.Errorf("%s: %q, want %q", property, got, want)
			}
		}
	})
	t.Run("not allowed", func(t *testing.T) {
		s := startDual(t, storeDir(t))
		needsSandbox(t, s)
		c := s.client(t)
		if s := execute(t, c.conn, "", putActionIn(t, c.client, connect, "network=external")).GetStatus(); s.GetCode() == 0 || !strings.Contains(s.GetMessage(), "--allow_network") {
			t.Errorf("network=external: %v, want a refusal that says what would be right", s)
		}
		if got := outputOf(t, c, putActionIn(t, c.client, connect, "network=none")); got != "no way\n" {
			t.Errorf("network=none: %q", got)
		}
	})
	t.Run("bare", func(t *testing.T) {
		s := startDual(t, storeDir(t), "--sandbox=bare")
		c := s.client(t)
		if !strings.Contains(s.log.String(), "NOT isolated") {
			t.Error("it does not say that actions are not isolated")
		}
		if got := outputOf(t, c, putActionIn(t, c.client, connect, "network=external")); got != "reached\n" {
			t.Errorf("network=external: %q", got)
		}
	})
}

// Actions see nothing of the credentials that the server has, and all the same paths
// whatever slot and server they are on.
func TestDual_sandbox(t *testing.T) {
	shared, err := os.MkdirTemp("/var/cache", "mettle-e2e-") //nolint:usetesting // temporary directories are hidden anyway
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(shared) })
	if err := os.Chmod(shared, 0o755); err != nil { //nolint:gosec // the point of it
		t.Fatal(err)
	}
	for _, name := range []string{"cloud.json", "hidden/tool", "hidden/secret", "seen"} {
		path := filepath.Join(shared, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // likewise
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(name), 0o644); err != nil { //nolint:gosec // likewise
			t.Fatal(err)
		}
	}
	s := newServer(t, "mettle", []string{"dual", "--dir=" + storeDir(t), "--sandbox_hide=" + shared + "/hidden", "--sandbox_show=" + shared + "/hidden/tool"})
	s.args = append(s.args, "--port="+strconv.Itoa(s.Port))
	s.env = []string{"GOOGLE_APPLICATION_CREDENTIALS=" + shared + "/cloud.json", "AWS_SECRET_ACCESS_KEY=a-cloud's-secret"}
	s.Start()
	needsSandbox(t, s)
	c := s.client(t)
	t.Run("credentials", func(t *testing.T) {
		look := "cd " + shared + " && find . -type f -size +0 | sort; cat /proc/[0-9]*/environ | grep -a -c cloud.s-secret"
		if got, want := outputOf(t, c, putAction(t, c.client, look+"; true")), "./hidden/tool\n./seen\n0\n"; got != want {
			t.Errorf("an action finds %q, want %q", got, want)
		}
	})
	t.Run("paths", func(t *testing.T) {
		script := "pwd; realpath .; mkdir -p src; echo 'const char *f = __FILE__; int main() { return 0; }' > src/a.c; "
		want := "/build\n/build\n"
		if _, err := exec.LookPath("gcc"); err == nil {
			script += "gcc -g -o a $PWD/src/a.c && strings -a a | grep -x /build/src/a.c | sort -u"
			want += "/build/src/a.c\n"
		}
		if got := outputOf(t, c, putAction(t, c.client, "export PATH=/usr/bin:/bin; "+script)); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})
	t.Run("metric", func(t *testing.T) {
		text := s.metrics(t)
		if !strings.Contains(text, `mettle_worker_isolation_info{isolation="namespace"} 1`) {
			t.Error("no metric says that actions are isolated")
		}
	})
}
