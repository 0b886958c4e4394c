package e2e_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/creds/credstest"
)

const trustPolicy = `
identities:
  - name: builder
    token_file: builder.token
    rights: [cas:read, cas:write, ac:read, execute]
  - name: api
    token_file: api.token
    rights: [cas:read, cas:write, ac:read, ac:write]
  - name: operator
    token_file: operator.token
    rights: [admin, cas:read]
  - name: workers
    certificate: {common_name: "worker-*"}
    rights: [cas:read, cas:write, ac:read, ac:write]
`

// trust is files of a site with TLS and a policy.
type trust struct {
	t       *testing.T
	dir     string
	ca      *credstest.Authority
	policy  string   // flag of servers
	tls     []string // likewise
	builder string   // the token
}

func newTrust(t *testing.T) *trust {
	t.Helper()
	tr := &trust{t: t, dir: t.TempDir(), ca: credstest.NewAuthority(t, "site"), builder: "builder-0123456789abcdef"}
	for _, name := range []string{"builder", "api", "operator"} {
		credstest.Write(t, tr.dir, name+".token", name+"-0123456789abcdef\n")
	}
	cert, key := tr.ca.Issue(tr.dir, "server", credstest.Server())
	tr.policy = "--policy=" + credstest.Write(t, tr.dir, "policy.yaml", trustPolicy)
	tr.tls = []string{"--tls_cert=" + cert, "--tls_key=" + key, "--tls_client_ca=" + credstest.Write(t, tr.dir, "ca.pem", tr.ca.PEM)}
	return tr
}

func (tr *trust) file(name string) string { return filepath.Join(tr.dir, name) }

// TestTrust builds with a fleet whose parts show each other who they are: Bazel and
// the API server by tokens, the worker by a certificate; to the storage by TLS.
// Debian's Bazel speaks none: the Netty of its packages knows no ALPN.
func TestTrust(t *testing.T) {
	tr := newTrust(t)
	broker := newNATS(t)
	broker.Start()
	audit := tr.file("audit.json")
	guarded := func(says, program string, args ...string) *server {
		s := newServer(t, program, append(args, tr.policy))
		s.args = append(s.args, "--port="+strconv.Itoa(s.Port))
		s.says = says
		s.Start()
		return s
	}
	elan := guarded("grpcs://", "elan", append(tr.tls, "--storage=file://"+storeDir(t), "--audit_log="+audit)...)
	queue := "--queue=nats://" + broker.Addr() + "/trust"
	storage := []string{queue, "--storage=grpcs://" + elan.Addr(), "--storage_tls_ca=" + tr.file("ca.pem")}
	api := guarded("grpc://", "mettle", append([]string{"api", "--storage_token_file=" + tr.file("api.token")}, storage...)...)
	cert, key := tr.ca.Issue(tr.dir, "worker", credstest.Client("worker-1"))
	worker := newServer(t, "mettle", append([]string{
		"worker", "--slots=2", "--dir=" + storeDir(t), "--storage_tls_client_cert=" + cert, "--storage_tls_client_key=" + key,
	}, storage...))
	worker.says = "Metrics, health"
	worker.Start()
	for _, s := range []*server{api, worker} {
		awaitReady(t, s)
	}

	b := newBazel(t)
	b.Write("trust/BUILD", `genrule(name = "rule", outs = ["out"], cmd = "echo made > $@")`)
	args := append(b.remote(api), "//trust:rule")
	if out, code := b.Run("build", args...); code == 0 || !strings.Contains(out, "authorization: Bearer TOKEN") {
		t.Errorf("a build that shows nothing of itself ended with %d, want a word on what to show\n%s", code, out)
	}
	if out, code := b.Run("build", append(args, "--remote_header=authorization=Bearer no-such-token-here")...); code == 0 || !strings.Contains(out, "not known here") {
		t.Errorf("a build with a wrong token ended with %d\n%s", code, out)
	}
	b.MustRun("build", append(args, "--remote_header=authorization=Bearer "+tr.builder, "--noremote_upload_local_results")...)

	run := func(program string, args ...string) (string, error) {
		out, err := exec.CommandContext(t.Context(), binary(t, program), args...).CombinedOutput()
		return string(out), err
	}
	at := func(token string) []string {
		return []string{"--remote=grpcs://" + elan.Addr(), "--tls_ca=" + tr.file("ca.pem"), "--token_file=" + tr.file(token)}
	}
	if out, err := run("elan", append([]string{"ls"}, at("operator.token")...)...); err != nil || len(strings.Fields(out)) == 0 {
		t.Errorf("elan ls of the operator: %v\n%s", err, out)
	}
	if out, err := run("elan", append([]string{"ls"}, at("builder.token")...)...); err == nil || !strings.Contains(out, "builder lacks the right admin") {
		t.Errorf("elan ls of a builder: %v\n%s", err, out)
	}
	if out, err := run("mettle", "operations", "--api="+api.Addr(), "--token_file="+tr.file("operator.token"), "list"); err != nil {
		t.Errorf("mettle operations of the operator: %v\n%s", err, out)
	}
	log, err := os.ReadFile(audit)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"identity":"workers:worker-1","by":"certificate"`, `ActionCache/UpdateActionResult`, `"identity":"operator"`} {
		if !strings.Contains(string(log), want) {
			t.Errorf("%s is not in the audit log:\n%s", want, log)
		}
	}
	if strings.Contains(string(log), tr.builder) {
		t.Error("a token is in the audit log")
	}
}

// TestTrust_wrong: what does not fit together ends the start, with what would.
func TestTrust_wrong(t *testing.T) {
	tr := newTrust(t)
	bad := credstest.Write(t, tr.dir, "bad.yaml", "identities:\n- name: x\n  rights: [fly]\n")
	for _, tc := range []struct {
		name string
		args []string
		want string
	}{
		{"tokens over a network without TLS", []string{"dual", "--host=0.0.0.0", "--policy=" + tr.file("policy.yaml")}, "--plaintext_tokens"},
		{"a policy with a mistake", []string{"dual", "--policy=" + bad}, `bad.yaml: line 3: "fly" is no right`},
		{"half a certificate", []string{"dual", "--tls_cert=" + tr.file("server.pem")}, "one of them is missing"},
		{"an audit log of nobody", []string{"dual", "--audit_log=-"}, "takes a --policy"},
		{"a token to another machine without TLS", []string{"worker", "--queue=nats://localhost:1/x", "--storage=elan.example:7777", "--storage_token_file=" + tr.file("api.token")}, "grpcs://"},
		{"TLS that is contradicted", []string{"worker", "--queue=nats://localhost:1/x", "--storage=grpc://elan.example:7777", "--storage_tls_ca=" + tr.file("ca.pem")}, "say grpcs://elan.example:7777"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			args := append(tc.args, "--http_port=-1")
			if args[0] == "dual" {
				args = append(args, "--port=0", "--dir="+t.TempDir())
			}
			out, err := exec.CommandContext(t.Context(), binary(t, "mettle"), args...).CombinedOutput()
			if err == nil || !strings.Contains(string(out), tc.want) {
				t.Errorf("%v, and %q is not in\n%s", err, tc.want, out)
			}
		})
	}
}

// TestBazel_trust builds over TLS, with a Bazel whose build has it: Debian's has not. From
// 3.1 on Bazel has a certificate of its own to show; before, the rights are anybody's.
func TestBazel_trust(t *testing.T) {
	if os.Getenv(bazelVar) == "" {
		t.Skipf("Debian's Bazel has no TLS; %s names another", bazelVar)
	}
	tr := newTrust(t)
	credstest.Write(t, tr.dir, "policy.yaml", "anonymous: {rights: [cas:read, cas:write, ac:read, execute]}\n")
	s := newServer(t, "mettle", append([]string{"dual", "--dir=" + storeDir(t), tr.policy}, tr.tls...))
	s.args = append(s.args, "--port="+strconv.Itoa(s.Port))
	s.says = "grpcs://"
	s.Start()
	b := newBazel(t)
	b.Write("trust/BUILD", `genrule(name = "rule", outs = ["out"], cmd = "echo made > $@")`)
	args := append(b.remote(s), "--remote_executor=grpcs://"+s.Addr(), "//trust:rule")
	if out, code := b.Run("build", args...); code == 0 {
		t.Errorf("Bazel took a certificate of an authority that it does not know:\n%s", out)
	}
	checkOnly(t, b.MustRun("build", append(args, "--tls_certificate="+tr.file("ca.pem"))...), "remote")
}
