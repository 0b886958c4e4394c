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
