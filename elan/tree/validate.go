// Package tree reads the two messages that describe directories: Directory,
// which names its children by digest, and Tree, which holds them all.
//
// Validate says whether a Directory is in the canonical form that the REAPI
// asks for; a Walk enumerates what lies below a root, for GetTree; Contents
// lists what a Tree refers to, for the completeness check of action results.
// Nothing here writes files (mettle/worker/inputroot does) or builds Trees
// (mettle/worker/output does), and nothing knows gRPC.
package tree

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/digest"
)

// ErrInvalid is wrapped by the errors about Directories and Trees that are not
// in the form that the REAPI asks for: the fault is in what somebody sent.
var ErrInvalid = errors.New("invalid directory")

// Validate reports whether d is in canonical form: each name is one path
// segment, the names of files, directories and symlinks are each sorted by
// their bytes and unique over all three, every digest is one of function fn,
// and no symlink is without a target. The errors wrap ErrInvalid, name the
// offending entry, and say what would be right. It does not change d.
func Validate(fn digest.Function, d *repb.Directory) error {
	if d == nil {
		return fmt.Errorf("%w: the message is absent", ErrInvalid)
	}
	prev := ""
	for _, f := range d.Files {
		if err := validateName("file", prev, f.GetName()); err != nil {
			return err
		}
		prev = f.GetName()
		if _, err := digest.FromProto(fn, f.GetDigest()); err != nil {
			return fmt.Errorf("%w: file %q: %w", ErrInvalid, prev, err)
		}
	}
	prev = ""
	for _, s := range d.Directories {
		if err := validateName("directory", prev, s.GetName()); err != nil {
			return err
		}
		prev = s.GetName()
		if _, err := digest.FromProto(fn, s.GetDigest()); err != nil {
			return fmt.Errorf("%w: directory %q: %w", ErrInvalid, prev, err)
		}
	}
	prev = ""
	for _, l := range d.Symlinks {
		if err := validateName("symlink", prev, l.GetName()); err != nil {
			return err
		}
		prev = l.GetName()
		if t := l.GetTarget(); t == "" || strings.IndexByte(t, 0) >= 0 {
			return fmt.Errorf("%w: symlink %q has target %q, want a path that is not empty and has no NUL", ErrInvalid, prev, t)
		}
	}
	return validateUnique(d)
}

// validateName checks one name, and that it comes after the one before it in
// its list. The first one's prev is empty, and so before every valid name.
func validateName(kind, prev, name string) error {
	switch {
	case name == "":
		return fmt.Errorf("%w: a %s after %q has an empty name, want one path segment", ErrInvalid, kind, prev)
	case name == "." || name == "..":
		return fmt.Errorf("%w: a %s is named %q, want the name of an entry of this directory", ErrInvalid, kind, name)
	case strings.IndexByte(name, '/') >= 0:
		return fmt.Errorf("%w: %s name %q has a slash, want one path segment, and a Directory for each level", ErrInvalid, kind, name)
	case strings.IndexByte(name, 0) >= 0:
		return fmt.Errorf("%w: %s name %q has a NUL, want a name without", ErrInvalid, kind, name)
	case !utf8.ValidString(name):
		return fmt.Errorf("%w: %s name %q is not UTF-8", ErrInvalid, kind, name)
	case name == prev:
		return fmt.Errorf("%w: two entries of the %s list are named %q, want each name once", ErrInvalid, kind, name)
	case name < prev:
		return fmt.Errorf("%w: %s %q stands after %q, want the names sorted by their UTF-8 bytes", ErrInvalid, kind, name, prev)
	}
	return nil
}

// validateUnique finds a name that two of the three lists share. The lists are
// sorted, so they are merged, which allocates nothing.
func validateUnique(d *repb.Directory) error {
	var f, s, l int
	for {
		fn, fok := "", f < len(d.Files)
		sn, sok := "", s < len(d.Directories)
		ln, lok := "", l < len(d.Symlinks)
		if fok {
			fn = d.Files[f].GetName()
		}
		if sok {
			sn = d.Directories[s].GetName()
		}
		if lok {
			ln = d.Symlinks[l].GetName()
		}
		switch {
		case fok && sok && fn == sn:
			return duplicate(fn, "a file", "a directory")
		case fok && lok && fn == ln:
			return duplicate(fn, "a file", "a symlink")
		case sok && lok && sn == ln:
			return duplicate(sn, "a directory", "a symlink")
		}
		switch {
		case fok && (!sok || fn < sn) && (!lok || fn < ln):
			f++
		case sok && (!lok || sn < ln):
			s++
		case lok:
			l++
		default:
			return nil
		}
	}
}

func duplicate(name, a, b string) error {
	return fmt.Errorf("%w: %q is the name of both %s and %s, want each name once", ErrInvalid, name, a, b)
}
