package nats

import "time"

// avoidFor is how long a job that was rejected here is left to other workers, if
// there are any that wait. When it is over, and nobody has taken it, it may as well
// be tried here.
const avoidFor = time.Second

// maxAvoided bounds Queue.avoided. A worker that rejects one job after another is
// to stop taking any.
const maxAvoided = 1024

// avoid leaves a job to others for a while.
func (q *Queue) avoid(operation string) {
	now := time.Now()
	q.mu.Lock()
	defer q.mu.Unlock()
	for old, until := range q.avoided {
		if now.After(until) {
			delete(q.avoided, old)
		}
	}
	if len(q.avoided) < maxAvoided {
		q.avoided[operation] = now.Add(avoidFor)
	}
}

// avoids reports for how long a job is still left to others.
func (q *Queue) avoids(operation string) time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.avoided) == 0 {
		return 0
	}
	return time.Until(q.avoided[operation])
}
