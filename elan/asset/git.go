package asset

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// gitFetcher fetches directories out of git repositories, by the git command. Only
// objects are fetched; nothing is checked out, so that no file of the repository
// ever is a file of this machine. So a directory has the files as they are in the
// commit: attributes such as eol and filters such as LFS change nothing, and
// submodules are empty directories.
type gitFetcher struct {
	s     *Service
	o     Options
	guard *Guard
}

// maxGitObject bounds what git takes in memory at once: an object that is kept as
// the difference from another, which a few bytes can make as large as they say. What
// is larger than gitStreamed, and no such difference, is not in memory as a whole.
const (
	maxGitObject = 1 << 30
	gitStreamed  = 32 << 20
)

// maxGitOutput bounds what is kept of what git says.
const maxGitOutput = 8 << 10

var fullID = regexp.MustCompile(`^([0-9a-f]{40}|[0-9a-f]{64})$`)

// fetch fetches the commit that w names, or the one at the head of its branch or
// of the repository, and stores its tree.
func (g *gitFetcher) fetch(ctx context.Context, w *want, src source) (fetched, error) {
	p, err := startProxy(ctx, g.o, g.guard)
	if err != nil {
		return fetched{}, err
	}
	defer p.close(ctx)
	scratch, err := g.s.dir.get()
	if err != nil {
		return fetched{}, fmt.Errorf("git: %w", err)
	}
	dir, err := os.MkdirTemp(scratch, "git-")
	if err != nil {
		return fetched{}, fmt.Errorf("git: %w", err)
	}
	defer os.RemoveAll(dir) //nolint:errcheck // emptied at the next start
	r := &repo{dir: dir, proxy: p, env: gitEnv(dir, p, w, src)}
	format := "sha1"
	if fullID.MatchString(w.commit) && len(w.commit) == 64 {
		format = "sha256"
	}
	if err := r.run(ctx, "init", "--quiet", "--bare", "--template=", "--object-format="+format, r.dir+"/repo"); err != nil {
		return fetched{}, r.own(err)
	}
	commit, err := r.get(ctx, w)
	if err != nil {
		return fetched{}, err
	}
	root, err := g.store(ctx, r, w, commit)
	return fetched{digest: root, qualifiers: []Qualifier{{qCommit, commit}}}, err
}

// repo is a repository that is being fetched into.
type repo struct {
	dir   string
	proxy *proxy
	env   []string
}

// get fetches the commit that is wanted and returns its id.
func (r *repo) get(ctx context.Context, w *want) (string, error) {
	head := "HEAD"
	if w.branch != "" {
		head = "refs/heads/" + w.branch
	}
	switch {
	case w.commit == "":
		if err := r.fetch(ctx, "--depth=1", head); err != nil {
			return "", err
		}
		return r.resolve(ctx, "FETCH_HEAD")
	case w.branch != "":
		return r.onBranch(ctx, head, w)
	}
	err := r.fetch(ctx, "--depth=1", w.commit)
	if err == nil {
		return r.resolve(ctx, "FETCH_HEAD")
	}
	if f, ok := errors.AsType[*FetchError](err); !ok || f.Reason != NotFound {
		return "", err
	}
	// Some servers give out only what a branch or a tag names, and no server knows
	// abbreviations: then it takes all branches and tags.
	if err := r.fetch(ctx, "+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"); err != nil {
		return "", err
	}
	return r.resolve(ctx, w.commit)
}

// onBranch is get for a commit that must be on a branch.
func (r *repo) onBranch(ctx context.Context, branch string, w *want) (string, error) {
	if err := r.fetch(ctx, "+"+branch+":refs/heads/wanted"); err != nil {
		return "", err
	}
	commit, err := r.resolve(ctx, w.commit)
	if err != nil {
		return "", err
	}
	err = r.run(ctx, "--git-dir="+r.dir+"/repo", "merge-base", "--is-ancestor", commit, "refs/heads/wanted")
	if err != nil && ctx.Err() == nil {
		return "", failed(NotFound, "commit %s is not on branch %.200q", commit, w.branch)
	}
	return commit, err
}

// fetch fetches refs. The URL is in the environment, as remote "origin".
func (r *repo) fetch(ctx context.Context, args ...string) error {
	all := []string{"--git-dir=" + r.dir + "/repo", "fetch", "--quiet", "--no-tags", "--no-recurse-submodules", "--no-auto-maintenance"}
	var refs []string
	for _, a := range args {
		if strings.HasPrefix(a, "--") {
			all = append(all, a)
		} else {
			refs = append(refs, a)
		}
	}
	err := r.run(ctx, append(append(all, "--", "origin"), refs...)...)
	if err == nil || ctx.Err() != nil {
		return err
	}
	return r.blame(err)
}

// resolve returns the id of the commit that rev names in the repository.
func (r *repo) resolve(ctx context.Context, rev string) (string, error) {
	out, err := r.output(ctx, "--git-dir="+r.dir+"/repo", "rev-parse", "--verify", "--quiet", "--end-of-options", rev+"^{commit}")
	if err != nil {
		if ctx.Err() != nil {
			return "", err
		}
		return "", failed(NotFound, "the repository has no commit %.200q", rev)
	}
	return strings.TrimSpace(string(out)), nil
}

// gitError is what git said when it failed.
type gitError struct {
	err    error
	stderr string
}

func (e *gitError) Error() string { return fmt.Sprintf("%v: %.500s", e.err, e.stderr) }
func (e *gitError) Unwrap() error { return e.err }

// own is for runs of git that no origin has to do with.
func (r *repo) own(err error) error {
	if errors.Is(err, exec.ErrNotFound) {
		return failed(Denied, "this server has no git")
	}
	return fmt.Errorf("git: %w", err)
}

// gitSays tells by git's words, which are English here, what went wrong. The first
// that is found counts.
//
//nolint:gochecknoglobals // an immutable table
var gitSays = []struct {
	words  string
	reason Reason
}{
	{"over limit", TooLarge}, // of maxGitObject
	{"couldn't find remote ref", NotFound},
	{"not our ref", NotFound},
	{"does not appear to be a git repository", NotFound},
	{"unadvertised object", NotFound},
	{"not found", NotFound},
	{"error: 404", NotFound},
	{"error: 410", NotFound},
	{"Authentication failed", Denied},
	{"could not read Username", Denied},
	{"error: 401", Denied},
	{"error: 403", Denied},
	{"error: 429", Busy},
	{"error: 503", Busy},
}

// blame makes a FetchError of what git says after a fetch.
func (r *repo) blame(err error) error {
	switch {
	case r.proxy.refused.Load():
		return failed(Denied, "the host is not on the public Internet, or a redirect leads to one that is not")
	case r.proxy.over.Load():
		return failed(TooLarge, "git transfers more bytes than are taken")
	}
	ge, ok := errors.AsType[*gitError](err)
	if !ok {
		return r.own(err)
	}
	for _, s := range gitSays {
		if strings.Contains(ge.stderr, s.words) {
			return failed(s.reason, "git: %s", firstLine(ge.stderr))
		}
	}
	return failed(Aborted, "git: %s", firstLine(ge.stderr))
}

var urls = regexp.MustCompile(`[a-z+]+://[^\s']+`)

// firstLine is what is worth passing on, without the URL, which may hold secrets.
func firstLine(s string) string {
	s, _, _ = strings.Cut(strings.TrimSpace(s), "\n")
	return fmt.Sprintf("%.300q", urls.ReplaceAllStringFunc(s, origin))
}

// run runs git.
func (r *repo) run(ctx context.Context, args ...string) error {
	_, err := r.output(ctx, args...)
	return err
}

// output runs git and returns what it prints.
func (r *repo) output(ctx context.Context, args ...string) ([]byte, error) {
	cmd := r.command(ctx, args...)
	var out, stderr head
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		return nil, &gitError{err: err, stderr: stderr.String()}
	}
	return out.Bytes(), nil
}

// head keeps the beginning of what is written to it.
type head struct{ bytes.Buffer }

// Write implements io.Writer.
func (h *head) Write(p []byte) (int, error) {
	h.Buffer.Write(p[:min(len(p), maxGitOutput-h.Len())])
	return len(p), nil
}

// killDelay is how long pipes may stay open after git's process group was killed.
const killDelay = 5 * time.Second

// command is git in a process group of its own, which ends with ctx.
func (r *repo) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "git", args...) //nolint:gosec // what clients say was checked, and follows "--" or stands in the environment
	cmd.Env, cmd.Dir = r.env, r.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error {
		err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		if errors.Is(err, syscall.ESRCH) {
			return os.ErrProcessDone
		}
		return err
	}
	cmd.WaitDelay = killDelay
	return cmd
}

// gitEnv is an environment in which git knows nothing but what it needs: not the
// configuration of the user or the machine, no credentials, no hooks, no protocols
// but http and https, and no way to them but the proxy. What may be secret stands
// here, since other users can read command lines.
func gitEnv(dir string, p *proxy, w *want, src source) []string {
	env := []string{
		"PATH=" + os.Getenv("PATH"),
		"HOME=" + dir, "XDG_CONFIG_HOME=" + filepath.Join(dir, "none"), "LC_ALL=C",
		"GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_SYSTEM=/dev/null", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_ATTR_NOSYSTEM=1",
		"GIT_TERMINAL_PROMPT=0", "GIT_ASKPASS=", "SSH_ASKPASS=", "GIT_ALLOW_PROTOCOL=http:https", "GIT_PROTOCOL_FROM_USER=0",
		"GIT_ALLOC_LIMIT=" + strconv.Itoa(maxGitObject),
	}
	for _, name := range []string{"SSL_CERT_FILE", "SSL_CERT_DIR", "GIT_EXEC_PATH"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	u := *src.url
	user := u.User
	u.User = nil
	headers := w.headers.of(src.index, src.url, src.uri)
	if user != nil && headers.Get("Authorization") == "" {
		headers.Set("Authorization", "Basic "+basic(user))
	}
	config := [][2]string{
		{"remote.origin.url", u.String()},
		{"http.proxy", p.url.String()},
		{"http.proxyAuthMethod", "basic"},
		{"core.hooksPath", "/dev/null"},
		{"core.fsmonitor", "false"},
		{"core.bigFileThreshold", strconv.Itoa(gitStreamed)},
		{"credential.helper", ""},
		{"gc.auto", "0"},
		{"protocol.version", "2"},
		{"fetch.recurseSubmodules", "false"},
		{"pack.threads", "2"},
	}
	if len(headers) > 0 {
		// To another host git would carry them along.
		config = append(config, [2]string{"http.followRedirects", "false"})
	}
	for name, values := range headers {
		for _, v := range values {
			config = append(config, [2]string{"http.extraHeader", http.CanonicalHeaderKey(name) + ": " + v})
		}
	}
	env = append(env, "GIT_CONFIG_COUNT="+strconv.Itoa(len(config)))
	for i, kv := range config {
		n := strconv.Itoa(i)
		env = append(env, "GIT_CONFIG_KEY_"+n+"="+kv[0], "GIT_CONFIG_VALUE_"+n+"="+kv[1])
	}
	return env
}

// basic is a URL's user and password as the Authorization header has them.
func basic(u *url.Userinfo) string {
	password, _ := u.Password()
	return base64.StdEncoding.EncodeToString([]byte(u.Username() + ":" + password))
}
