package rpc

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// takeoverWait is how long a stream that resumes an upload waits for the one
// before it to end. A broken connection is often noticed by the client first.
const takeoverWait = 5 * time.Second

// uploads are the uploads that are under way or were broken off, by resource
// name. Those that no stream works on are bounded in number and age.
type uploads struct {
	maxIdle int
	maxAge  time.Duration

	// mu guards what follows. Nothing is read, written or waited for under it.
	mu     sync.Mutex
	byName map[string]*upload
	idle   []*upload // those that no stream works on, the oldest first
}

// An upload is one blob on its way in. Who has taken it from uploads has it
// for itself, but for received.
type upload struct {
	name   string
	digest digest.Digest
	w      *blob.Verifying
	cancel context.CancelFunc

	received atomic.Int64 // bytes
	gathered gathered     // those of them that w does not have yet

	// free is closed when the stream that has the upload gives it back or ends
	// it; expire ends an idle one. Both are guarded by uploads.mu.
	free   chan struct{}
	expire *time.Timer
}

func newUploads(o Options) *uploads {
	return &uploads{maxIdle: o.MaxPartialUploads, maxAge: o.MaxPartialAge, byName: map[string]*upload{}}
}

// add registers a new upload, which is the caller's, in place of an older one of
// the same name. An older one that a stream works on goes on unregistered.
func (us *uploads) add(u *upload) {
	u.free = make(chan struct{})
	us.mu.Lock()
	old := us.byName[u.name]
	us.byName[u.name] = u
	idle := old != nil && us.forget(old)
	us.mu.Unlock()
	if idle {
		old.close()
	}
}

// received is how many bytes of the upload came so far; 0 if there is none.
func (us *uploads) received(name string) int64 {
	us.mu.Lock()
	defer us.mu.Unlock()
	if u := us.byName[name]; u != nil {
		return u.received.Load()
	}
	return 0
}

// resume takes the upload of that name, if there is one, and waits for a while
// if a stream works on it. The error is a status.
func (us *uploads) resume(ctx context.Context, name string) (*upload, error) {
	timeout := time.NewTimer(takeoverWait)
	defer timeout.Stop()
	for {
		us.mu.Lock()
		u := us.byName[name]
		if u == nil {
			us.mu.Unlock()
			return nil, nil //nolint:nilnil // none is no error
		}
		if us.forget(u) {
			u.free = make(chan struct{})
			us.mu.Unlock()
			return u, nil
		}
		free := u.free
		us.mu.Unlock()
		select {
		case <-free:
		case <-timeout.C:
			return nil, gstatus.Errorf(codes.Aborted, "another stream is writing %s: query its status and try again", name)
		case <-ctx.Done():
			return nil, gstatus.FromContextError(ctx.Err()).Err() //nolint:wrapcheck // a status
		}
	}
}

// suspend gives back an upload that another stream may go on with. The oldest
// goes where there are too many.
func (us *uploads) suspend(u *upload) {
	us.mu.Lock()
	if us.byName[u.name] != u {
		us.mu.Unlock()
		us.end(u)
		return
	}
	us.idle = append(us.idle, u)
	var oldest *upload
	if len(us.idle) > us.maxIdle {
		oldest = us.idle[0]
		us.forget(oldest)
		delete(us.byName, oldest.name)
	}
	if oldest != u {
		u.expire = time.AfterFunc(us.maxAge, func() { us.expire(u) })
	}
	close(u.free)
	us.mu.Unlock()
	if oldest != nil {
		oldest.close()
	}
}

// expire ends u if no stream has taken it.
func (us *uploads) expire(u *upload) {
	us.mu.Lock()
	idle := us.byName[u.name] == u && us.forget(u)
	if idle {
		delete(us.byName, u.name)
	}
	us.mu.Unlock()
	if idle {
		u.close()
	}
}

// end drops an upload that the caller has.
func (us *uploads) end(u *upload) {
	us.mu.Lock()
	if us.byName[u.name] == u {
		delete(us.byName, u.name)
	}
	close(u.free)
	us.mu.Unlock()
	u.close()
}

// forget takes u from the idle ones and reports whether it was one. The caller
// holds mu.
func (us *uploads) forget(u *upload) bool {
	for i, other := range us.idle {
		if other == u {
			us.idle = append(us.idle[:i], us.idle[i+1:]...)
			if u.expire != nil {
				u.expire.Stop()
			}
			return true
		}
	}
	return false
}

// close frees what the upload holds.
func (u *upload) close() {
	// Of a committed one nothing is lost, and of another nothing is to be kept.
	_ = u.w.Close()
	u.gathered.data.Free()
	u.cancel()
}
