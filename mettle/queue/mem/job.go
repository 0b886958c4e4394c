package mem

import (
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// A job is one that waits or is leased. Its fields are guarded by Queue.mu.
type job struct {
	msg  *queuepb.Job
	seq  uint64 // the order of publishing
	size int64  // what it counts for in Queue.bytes

	// index is the job's place in its pool's heap, or notWaiting.
	index int
	// attempt is the number of the last delivery, and fence that of the last
	// one of an earlier, withdrawn job of the same name, whose reports are not
	// about this one.
	attempt, fence uint32

	lease     *lease   // nil while it waits
	cancelled bool     // withdrawn while it was leased
	failures  []string // who had it and how that failed
	// replies are the API servers beside msg's reply_to that want to know.
	replies []string
	// executing is the newest news of its progress, for those who ask later.
	executing *queuepb.Update
}

const notWaiting = -1

// maxReplies bounds job.replies. More than two API servers that ask for one
// operation means that all but the last are gone.
const maxReplies = 4

// overheadBytes is what a waiting job takes beside its message's own bytes: the
// structs, the map's and the heap's slots.
const overheadBytes = 768

// sizeOf estimates the memory that a job takes, in bytes, without walking the message.
func sizeOf(m *queuepb.Job) int64 {
	return overheadBytes + int64(len(m.GetOperation())+len(m.GetInstanceName())+len(m.GetActionDigest())+
		len(m.GetAction())+len(m.GetCommand())+len(m.GetRequestMetadata()))
}

func (j *job) before(k *job) bool {
	if a, b := j.msg.GetPriority(), k.msg.GetPriority(); a != b {
		return a < b
	}
	return j.seq < k.seq
}

// A pool is the jobs that wait for a worker, or the workers that wait for a
// job. At any time only one of the two is not empty.
type pool struct {
	waiting jobHeap
	idle    []*waiter // the one that waits the shortest is last
}

// jobHeap is a heap of jobs that know their places in it.
type jobHeap []*job

func (h *jobHeap) push(j *job) {
	j.index = len(*h)
	*h = append(*h, j)
	h.up(j.index)
}

// remove takes out the job at index i.
func (h *jobHeap) remove(i int) *job {
	old := *h
	j, last := old[i], len(old)-1
	h.swap(i, last)
	old[last] = nil
	*h = old[:last]
	if i < last {
		h.down(i)
		h.up(i)
	}
	j.index = notWaiting
	return j
}

func (h jobHeap) swap(i, k int) {
	h[i], h[k] = h[k], h[i]
	h[i].index, h[k].index = i, k
}

func (h jobHeap) up(i int) {
	for i > 0 {
		parent := (i - 1) / 2
		if !h[i].before(h[parent]) {
			return
		}
		h.swap(i, parent)
		i = parent
	}
}

func (h jobHeap) down(i int) {
	for {
		least := i
		for c := 2*i + 1; c <= 2*i+2 && c < len(h); c++ {
			if h[c].before(h[least]) {
				least = c
			}
		}
		if least == i {
			return
		}
		h.swap(i, least)
		i = least
	}
}
