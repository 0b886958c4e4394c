//go:build linux

package hostile

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ProgramName is what the program is called as an input: it is the test's own
// executable.
const ProgramName = "hostile-action"

// What a script or the program ends with.
const (
	exitThrough = 0
	exitRefused = 1
	// exitBroken is that of an attack that went wrong by its own fault.
	exitBroken = 99
)

// IsProgram reports whether this process is the program.
func IsProgram() bool { return len(os.Args) > 1 && filepath.Base(os.Args[0]) == ProgramName }

// ProgramMain is its main, and returns its exit code.
func ProgramMain() int {
	if os.Args[1] == viewName {
		if err := printView(os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return exitBroken
		}
		return 0
	}
	attack, ok := attacks()[os.Args[1]]
	if !ok {
		fmt.Fprintf(os.Stderr, "no attack is called %q\n", os.Args[1])
		return exitBroken
	}
	err := attack()
	switch {
	case err == nil:
		return exitThrough
	case isRefusal(err):
		fmt.Fprintln(os.Stderr, err)
		return exitRefused
	}
	fmt.Fprintln(os.Stderr, "unexpected:", err)
	return exitBroken
}

// errRefused is for what has no errno.
var errRefused = errors.New("refused")

// isRefusal reports whether err is how a kernel says no.
func isRefusal(err error) bool {
	for _, no := range []error{
		errRefused, unix.EPERM, unix.EACCES, unix.EROFS, unix.ENOSYS, unix.ENOENT, unix.ESRCH, unix.ECONNREFUSED, unix.ENETUNREACH, unix.EHOSTUNREACH,
		unix.ENXIO, unix.ENODEV, unix.EXDEV, unix.EAFNOSUPPORT, unix.ENOSPC, unix.EUSERS, unix.EBUSY, unix.EOPNOTSUPP,
	} {
		if errors.Is(err, no) {
			return true
		}
	}
	return false
}

// wrap makes of a script one that ends with exitThrough, exitRefused or
// exitBroken, or by a signal.
func wrap(script string) string {
	return "set +e\n(\nset -e\n" + script + "\n)\n" +
		`code=$?
case $code in 126|127) exit 99;; 0|99) exit $code;; 1[2-9][0-9]) exit $code;; *) exit 1;; esac`
}

// Arguments are those of the case's Command.
func (c *Case) Arguments() []string {
	if c.Attack != "" {
		return append([]string{"./" + ProgramName}, strings.Fields(c.Attack)...)
	}
	return []string{"/bin/sh", "-c", wrap(c.Script)}
}
