//go:build linux

package image

import (
	"fmt"
	"path"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Reference names an image. It is comparable, and made by Parse.
type Reference struct {
	repo   name.Repository // of a registry
	path   string          // of a layout or tarball on this machine, else ""
	tag    string
	digest v1.Hash // zero: the tag counts
	listed bool    // the operator has named the registry
}

// String is the reference in the form that Parse takes.
func (r Reference) String() string {
	s := "docker://" + r.repo.Name()
	if r.path != "" {
		s = "oci://" + r.path
	}
	if r.digest != (v1.Hash{}) {
		return s + "@" + r.digest.String()
	}
	if r.tag != "" {
		s += ":" + r.tag
	}
	return s
}

// Digest is what the image is known by, "" for a tag.
func (r Reference) Digest() string {
	if r.digest == (v1.Hash{}) {
		return ""
	}
	return r.digest.String()
}

// repository is the reference without what changes from image to image.
func (r Reference) repository() Reference {
	r.tag, r.digest = "", v1.Hash{}
	return r
}

// maxReference bounds a reference: hosts and repositories have up to 255 bytes each.
const maxReference = 1 << 10

// Parse reads a reference that the operator allows. The error wraps ErrRefused.
func (c *Cache) Parse(s string) (Reference, error) {
	r, err := parse(s)
	if err == nil {
		err = c.allow(&r)
	}
	if err != nil {
		return Reference{}, fmt.Errorf("%w: %.*q: %w", ErrRefused, maxReference, s, err)
	}
	return r, nil
}

func parse(s string) (Reference, error) {
	if len(s) > maxReference {
		return Reference{}, fmt.Errorf("it is longer than %d bytes", maxReference)
	}
	rest, docker := strings.CutPrefix(s, "docker://")
	if !docker {
		var oci bool
		if rest, oci = strings.CutPrefix(s, "oci://"); !oci {
			return Reference{}, fmt.Errorf("it begins with neither docker:// nor oci://")
		}
		if strings.HasPrefix(rest, "/") {
			return parseLocal(rest)
		}
	}
	if strings.HasPrefix(rest, "/") {
		return Reference{}, fmt.Errorf("it has no registry; images on the machine of the worker are oci:///PATH")
	}
	base, digest, pinned := strings.Cut(rest, "@")
	tag, err := name.NewTag(base, name.WithDefaultTag("latest"))
	if err != nil {
		return Reference{}, err
	}
	r := Reference{tag: tag.TagStr()}
	// What is left out in names of Docker Hub is written out.
	if r.repo, err = name.NewRepository(tag.Repository.Name()); err != nil {
		return r, err
	}
	if pinned {
		r.tag = ""
		r.digest, err = parseDigest(digest)
	}
	return r, err
}

// parseLocal reads PATH@DIGEST or PATH:TAG or PATH.
func parseLocal(s string) (r Reference, err error) {
	p, digest, pinned := strings.Cut(s, "@")
	if pinned {
		r.digest, err = parseDigest(digest)
	} else if dir, base := path.Split(p); strings.Contains(base, ":") {
		base, r.tag, _ = strings.Cut(base, ":")
		p = dir + base
	}
	if err == nil && (filepath.Clean(p) != p || strings.ContainsRune(p, 0)) {
		err = fmt.Errorf("%q is no clean path", p)
	}
	r.path = p
	return r, err
}

func parseDigest(s string) (v1.Hash, error) {
	h, err := v1.NewHash(s)
	if err == nil && h.Algorithm != "sha256" {
		err = fmt.Errorf("digest %q is not of sha256", s)
	}
	return h, err
}

// allow checks r against the operator's lists.
func (c *Cache) allow(r *Reference) error {
	if r.digest == (v1.Hash{}) && !c.o.Tags {
		return fmt.Errorf("it has no digest: images are named by @sha256:... here, not by tags, which change")
	}
	if r.path != "" {
		for _, l := range c.locals {
			if l.rel(r.path) != "" {
				return nil
			}
		}
		return fmt.Errorf("it is not in a directory that the operator of this worker has set aside for images")
	}
	anywhere := false
	full := r.repo.Name()
	for _, allowed := range c.o.Registries {
		switch host, prefix, _ := strings.Cut(strings.TrimSuffix(allowed, "/"), "/"); {
		case allowed == "*":
			anywhere = true
		case canonical(host) != r.repo.RegistryStr():
		case prefix == "", full == canonical(host)+"/"+prefix, strings.HasPrefix(full, canonical(host)+"/"+prefix+"/"):
			r.listed = true
			return nil
		}
	}
	if !anywhere {
		return fmt.Errorf("the operator of this worker does not allow images of %s", r.repo.RegistryStr())
	}
	return nil
}

// canonical is a registry as references have it: docker.io is an alias.
func canonical(host string) string {
	r, err := name.NewRegistry(host)
	if err != nil {
		return host
	}
	return r.RegistryStr()
}
