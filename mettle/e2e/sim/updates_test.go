//go:build linux

package sim_test

import (
	"fmt"
	"slices"
	"time"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// A box is the updates for one API server id. It is guarded by broker.mu.
type box struct {
	id       string
	receiver *receiver
	kept     []*queuepb.Update // what came while nobody received
	// next is when the last update of an attempt arrives: those of one sender
	// about one operation stay in order.
	next map[string]time.Duration
}

// A receiver is a process that receives. What has arrived is guarded by broker.mu.
type receiver struct {
	p       *process
	asked   bool // the request has come
	arrived []*queuepb.Update
	wake    chan struct{} // of capacity 1: a token says that something has arrived
}

// box finds or makes the box of an API server. The mutex is held.
func (b *broker) box(id string) *box {
	x := b.boxes[id]
	if x == nil {
		x = &box{id: id, next: map[string]time.Duration{}}
		b.boxes[id] = x
	}
	return x
}

// maxKept bounds what is kept for an API server that does not come back.
const maxKept = 10_000

// post puts an update into the box of an API server, if there is one. The mutex
// is held.
func (b *broker) post(id string, u *queuepb.Update) {
	x := b.boxes[id]
	if x == nil || len(x.kept) >= maxKept {
		return
	}
	if u.GetStage() == queuepb.Update_REQUEUED && b.w.mutation == dropRequeued {
		return
	}
	if x.receiver == nil {
		x.kept = append(x.kept, u)
		return
	}
	b.transmit(x, u)
	key := fmt.Sprintf("again %s %s", x.id, b.w.label(u.GetOperation()))
	if b.w.unsettled() && b.w.plan.faults.has(duplicates) && b.w.dice.chance(key, 0.15) {
		time.AfterFunc(b.w.dice.between(key, 0, 90*time.Second), func() {
			b.mu.Lock()
			defer b.mu.Unlock()
			if x.receiver != nil {
				b.transmit(x, u)
			}
		})
	}
}

// transmit sends an update on its way to the receiver. The mutex is held.
func (b *broker) transmit(x *box, u *queuepb.Update) {
	r, key := x.receiver, fmt.Sprintf("to %s about %s", x.id, b.w.label(u.GetOperation()))
	after := b.w.dice.between(key, 200*time.Microsecond, 3*time.Millisecond)
	if b.w.unsettled() && b.w.plan.faults.has(delays) && b.w.dice.chance(key+" late", 0.15) {
		after = b.w.dice.between(key, 10*time.Millisecond, 40*time.Second)
		b.w.excuse(r.p.node, "a late update")
	}
	sender := fmt.Sprintf("%s %d %s", u.GetOperation(), u.GetAttempt(), u.GetWorker())
	at := max(b.w.now()+after, x.next[sender]+1)
	x.next[sender] = at
	time.AfterFunc(at-b.w.now(), func() { b.arrive(x, r, u, key) })
}

// arrive puts an update before its receiver. Where that can't be reached, it is
// sent again, and where it is gone, it is kept for the next.
func (b *broker) arrive(x *box, r *receiver, u *queuepb.Update, key string) {
	blocked := b.w.isCut(r.p.node, &b.service) || b.w.isDown(&b.service)
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case x.receiver == nil || !r.p.alive():
		x.kept = append(x.kept, u)
	case x.receiver != r:
		b.transmit(x, u)
	case blocked:
		time.AfterFunc(b.w.dice.between(key, 100*time.Millisecond, 2*time.Second), func() { b.arrive(x, r, u, key) })
	default:
		r.arrived = append(r.arrived, u)
		select {
		case r.wake <- struct{}{}:
		default: // there is a token
		}
	}
}

// receive begins to receive.
func (b *broker) receive(id string, r *receiver) {
	b.mu.Lock()
	defer b.mu.Unlock()
	x := b.box(id)
	if r.asked || !r.p.alive() {
		return
	}
	r.asked = true
	x.receiver = r
	b.w.trace("broker", "%s receives, %d are kept", r.p.name, len(x.kept))
	kept := x.kept
	x.kept = nil
	for _, u := range kept {
		b.transmit(x, u)
	}
}

// unreceive ends receiving. Unless it is to go on in another call, the server
// has gone for good.
func (b *broker) unreceive(id string, r *receiver, goesOn bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	r.asked = true // a request that comes late is for nobody
	x := b.boxes[id]
	if x == nil || x.receiver != r {
		return
	}
	x.receiver = nil
	x.kept = append(x.kept, r.arrived...)
	r.arrived = nil
	b.w.trace("broker", "%s receives no more, goes on: %v", r.p.name, goesOn)
	if !goesOn {
		delete(b.boxes, id)
	}
}

// fetch takes what has arrived.
func (b *broker) fetch(r *receiver) []*queuepb.Update {
	b.mu.Lock()
	defer b.mu.Unlock()
	us := r.arrived
	r.arrived = nil
	return us
}

// An ear is one who listens to notices.
type ear struct {
	p    *process
	said chan *queuepb.Notice // what does not fit is lost, as the contract allows
}

// maxSaid is the capacity of ear.said.
const maxSaid = 1024

func (b *broker) listen(e *ear) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !slices.Contains(b.ears, e) {
		b.ears = append(b.ears, e)
	}
}

func (b *broker) unlisten(e *ear) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ears = slices.DeleteFunc(b.ears, func(x *ear) bool { return x == e })
}

func (b *broker) notify(from string, n *queuepb.Notice) {
	if b.w.mutation == silentCancel && n.GetWorker() == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range b.ears {
		// Nobody says it again, even where all else is told twice.
		if b.w.unsettled() && b.w.plan.faults.has(losses) && b.w.dice.chance("notice lost "+from+" "+e.p.node, 0.3) {
			b.w.excuse(e.p.node, "a lost notice")
			continue
		}
		b.w.send("notice "+from+" "+e.p.node, e.p.node, &b.service, func() {
			select {
			case e.said <- n:
			default:
			}
		}, nil)
	}
}
