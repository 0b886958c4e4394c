//go:build linux

package persistent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// Bounds of what flag files can grow to.
const (
	maxArgumentBytes = 32 << 20
	maxFileDepth     = 16
	// What a file and a line count beside their bytes: they take time and memory, too.
	fileBytes, lineBytes = 4096, 16
)

// expand is the arguments of a request, by the rules of Bazel: @FILE stands for the
// lines of the file, among which there may be others such; what begins with @@ or
// looks like a label of another repository stands for itself, as does --flagfile=FILE.
// The files are below root, wherever symlinks lead.
func expand(root, workingDirectory string, args []string) ([]string, error) {
	r, err := os.OpenRoot(root)
	if err != nil {
		return nil, err
	}
	defer r.Close() //nolint:errcheck // only a handle
	e := expander{root: r, wd: workingDirectory, left: maxArgumentBytes}
	err = e.add(args, 0)
	return e.args, err
}

type expander struct {
	root *os.Root
	wd   string
	left int64
	args []string
}

func (e *expander) add(args []string, depth int) error {
	for _, a := range args {
		if !strings.HasPrefix(a, "@") || strings.HasPrefix(a, "@@") || strings.Contains(a, "//") {
			if !utf8.ValidString(a) {
				return fmt.Errorf("argument %.40q is not UTF-8, and the worker protocol knows nothing else", a)
			}
			e.args = append(e.args, a)
			continue
		}
		if depth == maxFileDepth {
			return fmt.Errorf("flag file %.200q: over %d of them within each other", a[1:], maxFileDepth)
		}
		lines, err := e.lines(a[1:])
		if err != nil {
			return fmt.Errorf("flag file: %w", err)
		}
		if err := e.add(lines, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func (e *expander) lines(name string) ([]string, error) {
	p := name
	if !path.IsAbs(p) {
		p = path.Join(e.wd, p)
	}
	// The process may have put a FIFO there, whose opening would wait for a writer.
	f, err := e.root.OpenFile(p, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // opened for reading
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(err, fmt.Errorf("%.200q is no file", name))
	}
	data, err := io.ReadAll(io.LimitReader(f, e.left+1))
	if err != nil {
		return nil, err
	}
	lineEnds := bytes.Count(data, []byte("\n"))
	if e.left -= fileBytes + int64(len(data)) + lineBytes*int64(lineEnds); e.left < 0 {
		return nil, fmt.Errorf("%.200q: the arguments have over %d bytes", name, maxArgumentBytes)
	}
	lines := strings.Split(string(data), "\n")
	if last := len(lines) - 1; lines[last] == "" {
		lines = lines[:last]
	}
	for i, l := range lines {
		lines[i] = strings.TrimSuffix(l, "\r")
	}
	return lines, nil
}
