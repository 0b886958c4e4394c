//go:build linux

package helper

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// What a shell returns for a program that it can't run.
const (
	codeNotExecutable = 126
	codeNotFound      = 127
)

// defaultPath is that of execvp where there is no PATH: confstr(_CS_PATH).
const defaultPath = "/bin:/usr/bin"

// programs lists the files that may be the program of spec, in the order in
// which they are tried.
func programs(spec *runner.Spec) (paths []string, code int, err error) {
	name := spec.Args[0]
	if strings.Contains(name, "/") {
		return []string{name}, 0, nil // the child looks from spec.Dir
	}
	search := defaultPath
	for _, v := range spec.Env {
		if p, ok := strings.CutPrefix(v, "PATH="); ok {
			search = p
			break // the first one counts, as in getenv
		}
	}
	code = codeNotFound
	for dir := range strings.SplitSeq(search, ":") {
		path := filepath.Join(dir, name)
		if !filepath.IsAbs(path) {
			path = filepath.Join(spec.Dir, path)
		}
		var st unix.Stat_t
		switch err := unix.Stat(path, &st); {
		case errors.Is(err, unix.EACCES):
			code = codeNotExecutable
		case err != nil || st.Mode&unix.S_IFMT == unix.S_IFDIR:
		case st.Mode&0o111 == 0:
			code = codeNotExecutable
		default:
			paths = append(paths, path)
		}
	}
	if len(paths) > 0 {
		return paths, 0, nil
	}
	if code == codeNotExecutable {
		return nil, code, fmt.Errorf("found in the PATH %q, but not executable", search)
	}
	return nil, code, fmt.Errorf("not found in the PATH %q", search)
}

// classify says whose fault it is that path could not be executed.
func classify(spec *runner.Spec, path string, err error) (code int, _ error) {
	if st, e := os.Stat(spec.Dir); e != nil || !st.IsDir() {
		return 0, fmt.Errorf("working directory %s: %w", spec.Dir, errors.Join(e, err))
	}
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ENFILE), errors.Is(err, unix.EMFILE):
		return 0, fmt.Errorf("fork: %w", err)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		if !filepath.IsAbs(path) {
			path = filepath.Join(spec.Dir, path)
		}
		if _, e := os.Stat(path); e == nil {
			return codeNotFound, fmt.Errorf("the interpreter or loader that it names is missing: %w", err)
		}
		return codeNotFound, err
	case errors.Is(err, unix.ENOEXEC):
		return codeNotExecutable, fmt.Errorf("%w: it is neither a program of this machine nor a script whose first line is #! and an interpreter", err)
	default:
		return codeNotExecutable, fmt.Errorf("cannot execute: %w", err)
	}
}
