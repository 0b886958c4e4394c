//go:build linux

package sim_test

import (
	"fmt"
	"sync"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	queuepb "github.com/mettle-build/mettle/proto/queue"
	"github.com/mettle-build/mettle/proto/releases"
)

// A peer is what release a process is of, as far as others can tell: it sees of a
// message, and sends, only what the release knows. Nil: it is today's.
type peer struct {
	name string
	// know takes out of a message what it knows nothing of.
	know func(proto.Message) error
}

// peers are the releases there are, one that knows only what proto/README.md says
// that everybody may expect, and one to come.
//
//nolint:gochecknoglobals // read once
var peers = sync.OnceValues(func() ([]*peer, error) {
	all := []*peer{{name: "bare", know: bare}, {name: toCome, know: more}}
	names, err := releases.Names()
	for _, name := range names {
		r, openErr := releases.Open(name)
		if openErr != nil {
			return nil, openErr
		}
		all = append(all, &peer{name: name, know: r.AsKnown})
	}
	return all, err
})

// bare takes out what nobody may depend on.
func bare(m proto.Message) error {
	switch m := m.(type) {
	case *queuepb.Job:
		m.Priority, m.Invocation, m.Queued, m.Expected = 0, "", nil, nil
		m.Action, m.Command, m.RequestMetadata, m.TraceContext = nil, nil, nil, nil
	case *queuepb.Update:
		m.PartialMetadata, m.Sent, m.StdoutStreamName, m.StderrStreamName = nil, nil, "", ""
	}
	return nil
}

// toCome is a release that has all that a later one may have: fields, stages and
// notices of which today's know nothing.
const toCome = "to come"

// stageToCome is one that nobody knows.
const stageToCome = queuepb.Update_Stage(99)

// more adds a field to a message.
func more(m proto.Message) error {
	r := m.ProtoReflect()
	r.SetUnknown(protowire.AppendString(protowire.AppendTag(r.GetUnknown(), 9999, protowire.BytesType), "of a release to come"))
	return nil
}

// saysMore are the updates that a process sends in place of one.
func (p *process) saysMore(u *queuepb.Update) []*queuepb.Update {
	if p.peer == nil || p.peer.name != toCome {
		return []*queuepb.Update{u}
	}
	before := &queuepb.Update{Operation: u.GetOperation(), Attempt: u.GetAttempt(), Worker: u.GetWorker(), Stage: stageToCome}
	return []*queuepb.Update{before, u}
}

// newPeer says of which release a process is. In half of the seeds each process
// is of one of its own, so that a place may go from one to another and back.
func (w *world) newPeer(process string) *peer {
	if !w.plan.mixed || w.dice.chance("today's "+process, 0.4) {
		return nil
	}
	all, err := peers()
	if err != nil {
		w.violate("the releases can't be read: %v", err)
		return nil
	}
	return all[w.dice.among("release of "+process, len(all))]
}

// String is what to call it.
func (p *peer) String() string {
	if p == nil {
		return "today's"
	}
	return p.name
}

// as is m as a process sees or sends it, which is m itself where that is today's.
func as[M proto.Message](p *process, m M) M {
	if p.peer == nil {
		return m
	}
	m = proto.CloneOf(m)
	if err := p.peer.know(m); err != nil {
		p.w.violate("%s, of release %s: %v", p.name, p.peer, fmt.Errorf("%T: %w", m, err))
	}
	return m
}
