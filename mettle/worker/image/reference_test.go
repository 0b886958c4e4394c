//go:build linux

package image_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/image"
)

const aDigest = "@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestParse(t *testing.T) {
	dir := t.TempDir()
	c := open(t, image.Options{Registries: []string{"docker.io", "ghcr.io/some/", "10.0.0.1:5000"}, LocalDirs: []string{dir}})
	anywhere := open(t, image.Options{Registries: []string{"*"}, Tags: true, LocalDirs: []string{dir}})
	for name, tc := range map[string]struct {
		c        *image.Cache
		in, want string // "" in want: it is refused
	}{
		"Docker Hub's own":      {c, "docker://ubuntu" + aDigest, "docker://index.docker.io/library/ubuntu" + aDigest},
		"Docker Hub":            {c, "docker://some/image:1.2" + aDigest, "docker://index.docker.io/some/image" + aDigest},
		"Docker Hub by name":    {c, "oci://docker.io/some/image" + aDigest, "docker://index.docker.io/some/image" + aDigest},
		"below a prefix":        {c, "docker://ghcr.io/some/a/b" + aDigest, "docker://ghcr.io/some/a/b" + aDigest},
		"the prefix":            {c, "docker://ghcr.io/some" + aDigest, "docker://ghcr.io/some" + aDigest},
		"beside a prefix":       {c, "docker://ghcr.io/something/a" + aDigest, ""},
		"another registry":      {c, "docker://quay.io/a" + aDigest, ""},
		"another port":          {c, "docker://10.0.0.1/a" + aDigest, ""},
		"a port":                {c, "docker://10.0.0.1:5000/a" + aDigest, "docker://10.0.0.1:5000/a" + aDigest},
		"a tag":                 {c, "docker://ubuntu:22.04", ""},
		"no tag":                {c, "docker://ubuntu", ""},
		"a tag that is allowed": {anywhere, "docker://quay.io/a/b:1", "docker://quay.io/a/b:1"},
		"the default tag":       {anywhere, "docker://quay.io/a/b", "docker://quay.io/a/b:latest"},
		"a layout":              {c, "oci://" + dir + "/a/b" + aDigest, "oci://" + dir + "/a/b" + aDigest},
		"a layout's tag":        {anywhere, "oci://" + dir + "/a:b", "oci://" + dir + "/a:b"},
		"a layout's only image": {anywhere, "oci://" + dir + "/a", "oci://" + dir + "/a"},
		"a layout elsewhere":    {anywhere, "oci:///etc" + aDigest, ""},
		"a way out":             {anywhere, "oci://" + dir + "/../x" + aDigest, ""},
		"not a local docker":    {anywhere, "docker:///etc/x" + aDigest, ""},
		"sha512":                {anywhere, "docker://a@sha512:" + strings.Repeat("0", 128), ""},
		"a short digest":        {anywhere, "docker://a@sha256:00", ""},
		"two digests":           {anywhere, "docker://a" + aDigest + aDigest, ""},
		"no scheme":             {anywhere, "ubuntu" + aDigest, ""},
		"upper case":            {anywhere, "docker://quay.io/A" + aDigest, ""},
		"long":                  {anywhere, "docker://" + strings.Repeat("a", 2000) + aDigest, ""},
		"empty":                 {anywhere, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := tc.c.Parse(tc.in)
			switch {
			case tc.want == "" && !errors.Is(err, image.ErrRefused):
				t.Errorf("Parse: %v, %v; want it refused", got, err)
			case tc.want != "" && (err != nil || got.String() != tc.want):
				t.Errorf("Parse: %v, %v; want %s", got, err, tc.want)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"docker://a/b:c" + aDigest, "oci:///a/b" + aDigest, "oci://a.b:1/c"} {
		f.Add(s)
	}
	c := open(f, image.Options{Registries: []string{"*"}, Tags: true, LocalDirs: []string{f.TempDir()}})
	f.Fuzz(func(t *testing.T, s string) {
		r, err := c.Parse(s)
		if err != nil {
			return
		}
		again, err := c.Parse(r.String())
		if err != nil || again != r {
			t.Errorf("%q is %v, and that is %v, %v", s, r, again, err)
		}
	})
}

// What lies in a directory of images is in it, and not behind a link that leads out.
func TestOpen_linkOutOfTheDirectory(t *testing.T) {
	img := imageOf(t, pack(t, file("a", "a")))
	path, dir := asLayout(t, img), t.TempDir()
	if err := os.Symlink(path, filepath.Join(dir, "layout")); err != nil {
		t.Fatal(err)
	}
	if _, err := get(t, open(t, image.Options{LocalDirs: []string{dir}}), local(t, filepath.Join(dir, "layout"), img)); !errors.Is(err, image.ErrUnusable) {
		t.Errorf("Open: %v", err)
	}
}

// Whatever is found in place of a blob, nobody waits for it.
func TestOpen_pipeInLayout(t *testing.T) {
	img := imageOf(t, pack(t, file("a", "a")))
	path := asLayout(t, img)
	blob := blobFile(path, digestOf(t, img))
	if err := errors.Join(os.Remove(blob), unix.Mkfifo(blob, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := get(t, open(t, image.Options{LocalDirs: []string{filepath.Dir(path)}}), local(t, path, img)); !errors.Is(err, image.ErrUnusable) {
		t.Errorf("Open: %v", err)
	}
}
