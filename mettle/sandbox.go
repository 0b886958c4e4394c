package main

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

// sandboxFlags say what keeps actions from the machine that they run on.
type sandboxFlags struct {
	Sandbox         string   `help:"What keeps actions from this machine. namespace: Linux namespaces, in which an action sees the machine read-only, no network, and nothing of other processes, homes and this program's directory. auto: the same where the machine allows it. bare: nothing but a user of its own for each slot where root runs this." enum:"auto,namespace,bare" default:"auto"`
	SandboxRoot     string   `name:"sandbox_root" help:"Where actions see their input root in a sandbox." default:"/build"`
	SandboxHide     []string `name:"sandbox_hide" help:"A file or directory that actions find empty in a sandbox, beside homes, /run, what only root may read, this program's directory, and the files of credentials that its flags and environment name; for several, give it several times." placeholder:"PATH" sep:"none"`
	SandboxShow     []string `name:"sandbox_show" help:"A file or directory below a hidden one, or a hidden one itself, that actions see all the same, read-only; for several, give it several times." placeholder:"PATH" sep:"none"`
	SandboxSyscalls string   `name:"sandbox_syscalls" help:"Which system calls actions may make in a sandbox. usual: all but those that no build needs, as mettle/worker/runner/seccomp/README.md lists them. all: every one." enum:"usual,all" default:"usual"`
}

func (f sandboxFlags) check() error {
	for _, l := range []struct {
		flag  string
		paths []string
	}{{"--sandbox_hide", f.SandboxHide}, {"--sandbox_show", f.SandboxShow}} {
		for _, p := range l.paths {
			if !filepath.IsAbs(p) || filepath.Clean(p) != p || p == "/" {
				return fmt.Errorf("%s: %q is no clean absolute path below /", l.flag, p)
			}
		}
	}
	for _, p := range f.SandboxShow {
		if _, err := os.Stat(p); err != nil {
			return fmt.Errorf("--sandbox_show: %w", err)
		}
	}
	return nil
}

// options puts what the flags say into those of the worker.
func (f sandboxFlags) options(o worker.Options) worker.Options {
	o.Isolation = worker.Isolation(f.Sandbox)
	o.SandboxRoot = f.SandboxRoot
	o.Hide = append(append(o.Hide, environmentSecrets()...), f.SandboxHide...)
	o.Show = append(o.Show, f.SandboxShow...)
	if f.SandboxSyscalls == "all" {
		o.Syscalls = sandbox.AllSyscalls
	}
	return o
}

// isolated says what keeps the actions of w from this machine, for people.
func isolated(w *worker.Worker) string {
	if w.Isolation() == worker.Namespaces {
		return "in a sandbox each"
	}
	return "NOT isolated from this machine"
}

// secretVariables name files, in the environments of programs that call clouds.
func secretVariables() []string {
	return []string{
		"GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE",
		"AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "AZURE_FEDERATED_TOKEN_FILE", "DOCKER_CONFIG", "KUBECONFIG", "NETRC",
	}
}

// secretsAtHome are in the home directory of whoever runs this, which need not be one
// that is hidden anyway.
func secretsAtHome() []string {
	return []string{".aws", ".config/gcloud", ".config/nats", ".docker", ".kube", ".ssh", ".gnupg", ".netrc", ".git-credentials"}
}

// environmentSecrets are the files and directories of credentials that this process
// finds by its environment. Those need not exist.
func environmentSecrets() []string {
	var names []string
	for _, v := range secretVariables() {
		names = append(names, filepath.SplitList(os.Getenv(v))...)
	}
	if home, err := os.UserHomeDir(); err == nil {
		for _, name := range secretsAtHome() {
			names = append(names, filepath.Join(home, name))
		}
	}
	return secretFiles(names...)
}

// secretFiles are the paths of files that flags name; empty names are none.
func secretFiles(names ...string) []string {
	var files []string
	for _, name := range names {
		if name == "" {
			continue
		}
		if abs, err := filepath.Abs(name); err == nil && abs != "/" {
			files = append(files, abs)
		}
	}
	return files
}

// secrets are the files of credentials that --queue names.
func (f *queueFlags) secrets() []string {
	_, query, _ := strings.Cut(f.Queue, "?")
	values, err := url.ParseQuery(query)
	if err != nil {
		return nil // it was checked
	}
	return secretFiles(values.Get("credentials"), values.Get("key"))
}
