package asset_test

import (
	"net/http"
	"net/http/cgi"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/asset"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/tree"
)

// gitRepo is a repository with a history, served over HTTP by git itself.
type gitRepo struct {
	*site
	t    *testing.T
	dir  string
	auth string // what Authorization has to be, if anything
	url  string
}

func newGitRepo(t *testing.T) *gitRepo {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "git", "--exec-path").Output()
	if err != nil {
		t.Skip("no git here")
	}
	backend := filepath.Join(strings.TrimSpace(string(out)), "git-http-backend")
	if _, err := os.Stat(backend); err != nil {
		t.Skip("no git-http-backend here")
	}
	g := &gitRepo{t: t, dir: t.TempDir()}
	g.git("init", "--quiet", "--initial-branch=main", "repo.git")
	g.dir = filepath.Join(g.dir, "repo.git")
	handler := &cgi.Handler{
		Path: backend, Dir: g.dir,
		Env:        []string{"GIT_PROJECT_ROOT=" + filepath.Dir(g.dir), "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_NOSYSTEM=1", "HOME=" + filepath.Dir(g.dir)},
		InheritEnv: []string{"PATH"}, Stderr: os.Stderr,
	}
	g.site = newSite(t, func(w http.ResponseWriter, r *http.Request) {
		if g.auth != "" && r.Header.Get("Authorization") != g.auth {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			http.Error(w, "who are you", http.StatusUnauthorized)
			return
		}
		if p := r.Header.Get("Git-Protocol"); p != "" {
			h := *handler
			h.Env = append(slices.Clone(h.Env), "GIT_PROTOCOL="+p)
			h.ServeHTTP(w, r)
			return
		}
		handler.ServeHTTP(w, r)
	})
	g.url = g.URL + "/repo.git"
	return g
}

func (g *gitRepo) git(args ...string) string {
	g.t.Helper()
	cmd := exec.CommandContext(g.t.Context(), "git", args...)
	cmd.Dir = g.dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null",
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@b", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@b",
		"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=protocol.file.allow", "GIT_CONFIG_VALUE_0=always")
	out, err := cmd.CombinedOutput()
	if err != nil {
		g.t.Fatalf("git %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func (g *gitRepo) write(path, data string, mode os.FileMode) {
	g.t.Helper()
	path = filepath.Join(g.dir, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		g.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(data), mode); err != nil {
		g.t.Fatal(err)
	}
}

// commit commits all there is, and returns the commit's id.
func (g *gitRepo) commit(message string) string {
	g.t.Helper()
	g.git("add", "-A")
	g.git("commit", "--quiet", "-m", message)
	return g.git("rev-parse", "HEAD")
}

// listing is the directory root as lines, for comparison.
func listing(t *testing.T, s blob.Store, root digest.Digest) string {
	t.Helper()
	dirs := map[digest.Digest]*repb.Directory{}
	if err := (tree.Walk{Opener: s}).Each(t.Context(), root, func(d digest.Digest, dir *repb.Directory) error {
		dirs[d] = dir
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	var lines []string
	var walk func(prefix string, d digest.Digest)
	walk = func(prefix string, d digest.Digest) {
		dir := dirs[d]
		for _, f := range dir.GetFiles() {
			fd, err := digest.FromProto(d.Function(), f.Digest)
			if err != nil {
				t.Fatal(err)
			}
			data, err := blob.ReadAll(t.Context(), s, fd, 1<<30)
			if err != nil {
				t.Fatal(err)
			}
			if len(data) > 40 {
				data = []byte(fd.String())
			}
			x := ""
			if f.IsExecutable {
				x = "*"
			}
			lines = append(lines, prefix+f.Name+x+"="+string(data))
		}
		for _, l := range dir.GetSymlinks() {
			lines = append(lines, prefix+l.Name+"->"+l.Target)
		}
		for _, c := range dir.GetDirectories() {
			cd, err := digest.FromProto(d.Function(), c.Digest)
			if err != nil {
				t.Fatal(err)
			}
			lines = append(lines, prefix+c.Name+"/")
			walk(prefix+c.Name+"/", cd)
		}
	}
	walk("", root)
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func wantDirectory(t *testing.T, a *asset.Service, s blob.Store, r asset.Request, want ...string) asset.Response {
	t.Helper()
	got, err := a.FetchDirectory(t.Context(), r)
	if err != nil {
		t.Fatalf("fetch %v: %v", r.URIs, err)
	}
	slices.Sort(want)
	if l := listing(t, s, got.Digest); l != strings.Join(want, "\n") {
		t.Fatalf("fetch %v:\n%s\nwant\n%s", r.URIs, l, strings.Join(want, "\n"))
	}
	return got
}

func qualifier(qs []asset.Qualifier, name string) string {
	for _, q := range qs {
		if q.Name == name {
			return q.Value
		}
	}
	return ""
}

func TestFetchDirectory_git(t *testing.T) {
	g := newGitRepo(t)
	big := strings.Repeat("0123456789abcdef", 100_000) // over what goes into batches, and into memory
	g.write("README", "hello\n", 0o644)
	g.write("sub/run.sh", "#!/bin/sh\n", 0o755)
	g.write("sub/deep/same", "hello\n", 0o644)
	g.write("sub/empty", "", 0o644)
	g.write("big", big, 0o644)
	// Neither is applied: a directory has the bytes of the commit.
	g.write(".gitattributes", "*.txt eol=crlf\nREADME export-ignore\n", 0o644)
	g.write("lines.txt", "a\nb\n", 0o644)
	if err := os.Symlink("../etc/passwd", filepath.Join(g.dir, "link")); err != nil {
		t.Fatal(err)
	}
	first := g.commit("first")
	g.git("tag", "v1.0")
	g.git("update-index", "--add", "--cacheinfo", "160000,"+first+",module")
	if err := os.Mkdir(filepath.Join(g.dir, "module"), 0o755); err != nil {
		t.Fatal(err)
	}
	g.write("README", "second\n", 0o644)
	second := g.commit("second")
	g.git("checkout", "--quiet", "-b", "other", first)
	g.write("only", "on other\n", 0o644)
	third := g.commit("third")
	g.git("checkout", "--quiet", "main")

	base := []string{
		".gitattributes=*.txt eol=crlf\nREADME export-ignore\n", "big=" + of(big).String(), "lines.txt=a\nb\n", "link->../etc/passwd",
		"sub/", "sub/deep/", "sub/deep/same=hello\n", "sub/empty=", "sub/run.sh*=#!/bin/sh\n",
	}
	firstFiles := append([]string{"README=hello\n"}, base...)
	secondFiles := append([]string{"README=second\n"}, base...)
	otherFiles := append([]string{"only=on other\n"}, firstFiles...)
	for _, tc := range []struct {
		name   string
		pairs  []string
		commit string
		want   []string
	}{
		{"the head", nil, second, secondFiles},
		{"the type says so", []string{"resource_type", "application/x-git"}, second, secondFiles},
		{"a branch", []string{"vcs.branch", "other"}, third, otherFiles},
		{"a commit", []string{"vcs.commit", first}, first, firstFiles},
		{"a commit that is no head's", []string{"vcs.commit", third}, third, otherFiles},
		{"a tag", []string{"vcs.commit", "v1.0"}, first, firstFiles},
		{"an abbreviation", []string{"vcs.commit", first[:12]}, first, firstFiles},
		{"a commit on a branch", []string{"vcs.commit", first, "vcs.branch", "main"}, first, firstFiles},
		{"a directory", []string{"directory", "sub/deep", "vcs.branch", "main"}, second, []string{"same=hello\n"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newStore(t)
			a := newService(t, s, asset.Options{})
			if slices.Contains(tc.want, "README=second\n") {
				tc.want = append(slices.Clone(tc.want), "module/")
			}
			got := wantDirectory(t, a, s, request(g.url, tc.pairs...), tc.want...)
			if c := qualifier(got.Qualifiers, "vcs.commit"); c != tc.commit || got.URI != g.url {
				t.Errorf("commit %s of %s, want %s of %s", c, got.URI, tc.commit, g.url)
			}
			n := len(g.requests())
			wantDirectory(t, a, s, request(g.url, tc.pairs...), tc.want...)
			if len(g.requests()) != n {
				t.Error("what is known was fetched again")
			}
		})
	}
	for _, tc := range []struct {
		name, url string
		pairs     []string
		reason    asset.Reason
		words     string
	}{
		{"no such branch", g.url, []string{"vcs.branch", "nobody"}, asset.NotFound, "nobody"},
		{"no such commit", g.url, []string{"vcs.commit", strings.Repeat("1", 40)}, asset.NotFound, "1111"},
		{"no such tag", g.url, []string{"vcs.commit", "v9"}, asset.NotFound, "v9"},
		{"a commit on another branch", g.url, []string{"vcs.commit", third, "vcs.branch", "main"}, asset.NotFound, third},
		{"no such repository", g.URL + "/secret.git", nil, asset.NotFound, "not found"},
		{"no such directory", g.url, []string{"directory", "nowhere", "vcs.branch", "main"}, asset.NotFound, "nowhere"},
		{"a file is no directory", g.url, []string{"directory", "README", "vcs.branch", "main"}, asset.NotFound, "README"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := newService(t, nil, asset.Options{})
			_, err := a.FetchDirectory(t.Context(), request(tc.url, tc.pairs...))
			wantReason(t, err, tc.reason, tc.words)
		})
	}
}

func TestFetchDirectory_gitCredentials(t *testing.T) {
	g := newGitRepo(t)
	g.write("a", "hello\n", 0o644)
	g.commit("first")
	a := newService(t, nil, asset.Options{})
	g.auth = "Basic dXNlcjpzZWNyZXQ=" // user:secret
	_, err := a.FetchDirectory(t.Context(), request(g.url))
	wantReason(t, err, asset.Denied)
	withUser := strings.Replace(g.url, "://", "://user:secret@", 1)
	if _, err := a.FetchDirectory(t.Context(), request(withUser)); err != nil {
		t.Errorf("with a user in the URL: %v", err)
	}
	if _, err := a.FetchDirectory(t.Context(), request(g.url, "http_header_url:0:authorization", g.auth)); err != nil {
		t.Errorf("with a header: %v", err)
	}
	_, err = a.FetchDirectory(t.Context(), request(strings.Replace(withUser, "secret", "secrets", 1)))
	wantReason(t, err, asset.Denied)
	// What one got with his credentials is not another's.
	_, err = a.FetchDirectory(t.Context(), request(g.url))
	wantReason(t, err, asset.Denied)
	for _, r := range g.requests() {
		if r.Header.Get("Proxy-Authorization") != "" {
			t.Error("the proxy's password went to the origin")
		}
	}
}

// TestFetchDirectory_gitRedirects: git follows redirects, not inside, and not with
// the client's headers.
func TestFetchDirectory_gitRedirects(t *testing.T) {
	inside := newGitRepo(t) // at 127.0.0.1
	inside.write("a", "hello\n", 0o644)
	inside.commit("first")
	outside := listenAt(t, "127.0.0.2", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, inside.URL+r.URL.RequestURI(), http.StatusMovedPermanently)
	})
	s := newStore(t)
	open := newService(t, s, asset.Options{})
	wantDirectory(t, open, s, request(outside.URL+"/repo.git"), "a=hello\n")
	n := len(inside.requests())
	_, err := open.FetchDirectory(t.Context(), request(outside.URL+"/repo.git", "http_header:Private-Token", "secret"))
	wantReason(t, err, asset.Aborted)
	guarded := newService(t, nil, asset.Options{AllowPrivate: only("127.0.0.2")})
	_, err = guarded.FetchDirectory(t.Context(), request(outside.URL+"/repo.git"))
	wantReason(t, err, asset.Denied, "public")
	if got := len(inside.requests()); got != n {
		t.Errorf("%d requests came inside", got-n)
	}
}

func TestFetchDirectory_gitLimits(t *testing.T) {
	g := newGitRepo(t)
	g.write("zeros", strings.Repeat("\x00", 1<<20), 0o644) // which travel as a few bytes
	g.commit("first")
	a := newService(t, nil, asset.Options{MaxBytes: 256 << 10})
	_, err := a.FetchDirectory(t.Context(), request(g.url))
	wantReason(t, err, asset.TooLarge, "its files")
	a = newService(t, nil, asset.Options{MaxBytes: 100})
	_, err = a.FetchDirectory(t.Context(), request(g.url))
	wantReason(t, err, asset.TooLarge, "transfers")
}

// TestFetchDirectory_gitCancelled: git ends with the fetch, whatever it waits for.
func TestFetchDirectory_gitCancelled(t *testing.T) {
	g := newGate(t)
	a := newService(t, nil, asset.Options{})
	r := request(g.URL + "/repo.git")
	r.Timeout = 200 * time.Millisecond
	_, err := a.FetchDirectory(t.Context(), r)
	wantReason(t, err, asset.TimedOut)
	<-g.ended
}

// TestFetchDirectory_gitEnvironment: nothing that this process has around it counts.
func TestFetchDirectory_gitEnvironment(t *testing.T) {
	g := newGitRepo(t)
	g.write("a", "hello\n", 0o644)
	g.commit("first")
	home := t.TempDir()
	config := filepath.Join(home, ".gitconfig")
	if err := os.WriteFile(config, []byte("[url \"http://127.0.0.1:1/\"]\n\tinsteadOf = "+g.URL+"\n[http]\n\tproxy = http://127.0.0.1:1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{
		"HOME": home, "XDG_CONFIG_HOME": home, "GIT_CONFIG_GLOBAL": config, "GIT_DIR": home, "GIT_WORK_TREE": home,
		"http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1", "ALL_PROXY": "http://127.0.0.1:1", "no_proxy": "*",
		"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "http.proxy", "GIT_CONFIG_VALUE_0": "http://127.0.0.1:1", "GIT_PROXY_COMMAND": "false",
	} {
		t.Setenv(name, value)
	}
	s := newStore(t)
	a := newService(t, s, asset.Options{})
	wantDirectory(t, a, s, request(g.url), "a=hello\n")
	wantBlob(t, a, s, request(newSite(t, serving("hello")).URL), "hello")
}

func TestFetchDirectory_noGit(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	a := newService(t, nil, asset.Options{})
	_, err := a.FetchDirectory(t.Context(), request("https://127.0.0.1:1/repo.git"))
	wantReason(t, err, asset.Denied, "no git")
}
