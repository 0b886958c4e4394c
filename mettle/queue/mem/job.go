package mem

import (
	"time"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// A job is one that waits or is leased. Its fields are guarded by Queue.mu.
type job struct {
	msg  *queuepb.Job
	size int64 // what it counts for in Queue.bytes

	// due orders the jobs of one invocation and priority, and seq, the order
	// of publishing, those that are due at the same time.
	due time.Duration
	seq uint64
	// pool is that of the last publication; priority and invocation are the first
	// one's, or those of a later and more urgent one.
	pool       string
	priority   int32
	invocation string
	line       *line // where it waits, at index; nil while it does not
	index      int

	// attempt is the number of the last delivery, and fence that of the last
	// one of an earlier, withdrawn job of the same name, whose reports are not
	// about this one.
	attempt, fence uint32

	lease     *lease   // nil while it waits
	cancelled bool     // withdrawn while it was leased
	failures  []string // who had it and how that failed
	// replies are the API servers beside msg's reply_to that want to know.
	replies []string
	// news is the newest of the worker that has it, for those who ask later.
	news *queuepb.Update
}

// maxReplies bounds job.replies. More than two API servers that ask for one
// operation means that all but the last are gone.
const maxReplies = 4

// maxExpected bounds what a job's expected time counts for: a day is as long as
// actions may run by default.
const maxExpected = 24 * time.Hour

// overheadBytes is what a waiting job takes beside its message's own bytes: the
// structs, the map's and the heaps' slots.
const overheadBytes = 768

// newJob makes a job of a message that is published at the time now, counted
// from any fixed moment.
func newJob(msg *queuepb.Job, now time.Duration) *job {
	return &job{
		msg: msg, size: sizeOf(msg), due: now - min(max(msg.GetExpected().AsDuration(), 0), maxExpected),
		pool: msg.GetPool(), priority: msg.GetPriority(), invocation: msg.GetInvocation(), index: nowhere,
	}
}

// sizeOf estimates the memory that a job takes, in bytes, without walking the message.
func sizeOf(m *queuepb.Job) int64 {
	return overheadBytes + int64(len(m.GetOperation())+len(m.GetInstanceName())+len(m.GetActionDigest())+
		len(m.GetAction())+len(m.GetCommand())+len(m.GetRequestMetadata())+len(m.GetInvocation()))
}

func (j *job) before(k *job) bool {
	if j.due != k.due {
		return j.due < k.due
	}
	return j.seq < k.seq
}

func (j *job) place() *int { return &j.index }
