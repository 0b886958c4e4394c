//go:build linux

package helper

import (
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/runner"
)

// A Confiner is a Setting that has commands start on a thread of their own. What
// that thread has given up, and the namespaces that it alone has entered, its
// children have too, while the helper's own thread, on which everything else
// happens, keeps what it needs.
type Confiner interface {
	Setting
	// Confine is called once, on that thread, when the helper has been set up.
	Confine(Start) error
	// Seen is where the helper's own thread finds what commands find at path.
	Seen(path string) string
	// Renew is called on that thread before each command, after Prepare.
	Renew() error
}

// Start is how the thread starts commands.
type Start struct {
	// IntoGroup: into a control group, with the clone3(2) of package syscall.
	IntoGroup bool
}

// starter is the goroutine on that thread. It lives as long as the helper.
type starter struct {
	specs   chan *runner.Spec // unbuffered, as is the other: one is at work
	started chan started
	tid     int
}

type started struct {
	child child
	code  int
	err   error
}

func newStarter(h *helper, c Confiner) (*starter, error) {
	s := &starter{specs: make(chan *runner.Spec), started: make(chan started)}
	go func() {
		// For good: Pdeathsig would kill the command with its thread.
		runtime.LockOSThread()
		s.tid = unix.Gettid()
		err := h.group.Join() // whose files are outside
		if err == nil {
			_, into := h.group.Into()
			err = c.Confine(Start{IntoGroup: into})
		}
		s.started <- started{err: err}
		for spec := range s.specs {
			var r started
			if r.err = c.Renew(); r.err == nil {
				r.child, r.code, r.err = h.launch(spec)
			}
			s.started <- r
		}
	}()
	return s, (<-s.started).err
}

func (s *starter) start(spec *runner.Spec) (child, int, error) {
	s.specs <- spec
	r := <-s.started
	return r.child, r.code, r.err
}
