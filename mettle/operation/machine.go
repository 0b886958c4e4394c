package operation

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// Why an operation has Failed that could be published.
var (
	// ErrAbandoned is the end of an operation that nobody waited for any more.
	ErrAbandoned = errors.New("the operation was abandoned")
	// ErrCancelled is the end of an operation, or of the wait by one of its
	// names, that somebody has asked for.
	ErrCancelled = errors.New("the operation was cancelled")
	// ErrWithdrawn is the end of an operation whose job somebody else has
	// withdrawn. Who waits for it all the same begins anew.
	ErrWithdrawn = errors.New("the job of the operation was withdrawn")
)

// Stage is where an operation is. The stages that clients know have the numbers
// that they have in REAPI's ExecutionStage.Value.
type Stage uint8

// The stages.
const (
	Unknown    Stage = iota // not accepted yet
	CacheCheck              // the ActionCache is being asked
	Queued                  // it waits for a worker
	Executing               // a worker has it
	Completed               // it has a response
	// Failed: it never reached the queue, was abandoned, cancelled or withdrawn.
	// It is not there any more.
	Failed
)

// String is the name of the stage in REAPI, lower case.
func (s Stage) String() string {
	names := [...]string{"unknown", "cache_check", "queued", "executing", "completed", "failed"}
	if int(s) >= len(names) {
		return fmt.Sprintf("Stage(%d)", uint8(s))
	}
	return names[s]
}

// Kind is what has happened to an operation.
type Kind uint8

// The kinds of events, with the fields of Event that belong to each.
const (
	Accepted      Kind = iota + 1 // a client asks, and a cached result will do
	AcceptedSkip                  // a client asks, and wants no cached result
	CacheHit                      // Response is the answer
	CacheMiss                     // there is none
	Published                     // the broker has the job
	PublishFailed                 // the broker does not have it: Err
	Updated                       // a worker or the broker reports: Update
	Joined                        // one client more waits
	Left                          // one client fewer
	Abandoned                     // the abandonment timer has fired
	Cancelled                     // all who wait have asked for its end
	Withdrawn                     // somebody else has withdrawn the job; Update may tell which attempt
	TakenOver                     // another API server looks after the job from now on
	TookOver                      // this API server does
)

// An Event is something that has happened to an operation.
type Event struct {
	Kind     Kind
	Response []byte // a marshalled ExecuteResponse
	Err      error
	Update   *queuepb.Update
}

// Effects is what is to be done because of an event: a set, and in this order.
type Effects uint16

// The effects.
const (
	// Notify: the Snapshot has changed; all who wait are to see it.
	Notify Effects = 1 << iota
	// Lookup: ask the ActionCache.
	Lookup
	// Publish: give the job to the broker.
	Publish
	// Withdraw: have the broker cancel the job.
	Withdraw
	// StartTimer and StopTimer: nobody waits any more, or somebody does again.
	StartTimer
	StopTimer
	// Retire: nobody may be merged with it any more, and after a while it is forgotten.
	Retire
	// Forget: it is to be forgotten at once.
	Forget
)

// Has reports whether all effects of f are in e.
func (e Effects) Has(f Effects) bool { return e&f == f }

// String lists the effects, for transcripts.
func (e Effects) String() string {
	var out []string
	for i, name := range [...]string{"notify", "lookup", "publish", "withdraw", "start-timer", "stop-timer", "retire", "forget"} {
		if e.Has(1 << i) {
			out = append(out, name)
		}
	}
	if len(out) == 0 {
		return "nothing"
	}
	return strings.Join(out, " ")
}

// A Snapshot is the state of an operation that clients may see. It is immutable.
type Snapshot struct {
	Stage Stage
	// Attempt and Worker are those of the newest delivery of the job that was
	// heard of, if any.
	Attempt uint32
	Worker  string
	// Metadata is what that worker told last, a marshalled ExecutedActionMetadata.
	Metadata []byte
	// StdoutStream and StderrStream are the names of log streams in which that attempt's
	// output can be read, where there are some.
	StdoutStream, StderrStream string
	// Response is the marshalled ExecuteResponse of a Completed operation.
	Response []byte
	// Err says why the operation has Failed.
	Err error
}

// Ended reports whether nothing more will happen.
func (s *Snapshot) Ended() bool { return s.Stage >= Completed }

// A Machine is the state of one operation: what has happened so far decides
// what an event means. It knows no clock and does no I/O, and is for one
// goroutine at a time. The zero Machine is an operation that nobody has asked
// for yet.
type Machine struct {
	snap    Snapshot
	waiters int
	// progress is how far the newest attempt has come.
	progress progress
	// timing says that the abandonment timer runs.
	timing bool
	// published says that the broker may have the job.
	published bool
	// elsewhere says that another API server withdraws the job, if anybody does.
	elsewhere bool
}

// progress orders the stages within an attempt. News may arrive late, but
// never takes an attempt back.
type progress uint8

const (
	unheard progress = iota
	executing
	requeued
)

// Snapshot is the present state.
func (m *Machine) Snapshot() Snapshot { return m.snap }

// Waiters counts the clients that wait.
func (m *Machine) Waiters() int { return m.waiters }

// Step takes in an event and returns what is to be done because of it. An event
// that makes no sense now changes nothing.
func (m *Machine) Step(e Event) Effects {
	switch e.Kind {
	case Joined:
		return m.joined()
	case Left:
		return m.left()
	case Updated:
		return m.updated(e.Update)
	}
	if m.snap.Ended() {
		return m.afterEnd(e)
	}
	switch e.Kind {
	case Accepted:
		return m.accepted(CacheCheck, Lookup)
	case AcceptedSkip:
		return m.accepted(Queued, Publish)
	case CacheMiss:
		if m.snap.Stage != CacheCheck {
			return 0
		}
		m.snap.Stage = Queued
		return Notify | Publish
	case CacheHit:
		if m.snap.Stage != CacheCheck {
			return 0
		}
		return m.complete(e.Response)
	case Published:
		m.published = true
		return 0
	case PublishFailed:
		return m.publishFailed(e.Err)
	case Abandoned:
		return m.abandoned()
	case Cancelled:
		return m.fail(ErrCancelled) | m.withdraw()
	case Withdrawn:
		if a := e.Update.GetAttempt(); a > 0 && a < m.snap.Attempt {
			return 0
		}
		return m.fail(ErrWithdrawn)
	case TakenOver:
		return m.takenOver()
	case TookOver:
		m.elsewhere = false
	}
	return 0
}

// afterEnd sees to a Publish that was under way when the operation was
// cancelled: what was withdrawn then, if anything, was not that job.
func (m *Machine) afterEnd(e Event) Effects {
	if e.Kind != Published && e.Kind != PublishFailed || m.published {
		return 0
	}
	m.published = true
	if m.snap.Stage == Failed && !errors.Is(m.snap.Err, ErrWithdrawn) {
		return m.withdraw()
	}
	return 0
}

func (m *Machine) accepted(stage Stage, effect Effects) Effects {
	if m.snap.Stage != Unknown {
		return 0
	}
	m.snap.Stage = stage
	return Notify | effect
}

func (m *Machine) joined() Effects {
	m.waiters++
	if m.timing {
		m.timing = false
		return StopTimer
	}
	return 0
}

func (m *Machine) left() Effects {
	if m.waiters == 0 {
		return 0
	}
	m.waiters--
	if m.waiters > 0 || m.snap.Ended() {
		return 0
	}
	m.timing = true
	return StartTimer
}

// publishFailed ends the operation, unless somebody has heard of the job: then
// the broker does have it, whatever it said.
func (m *Machine) publishFailed(err error) Effects {
	if m.published || m.progress != unheard || m.snap.Attempt > 0 {
		return 0
	}
	m.published = true // or not, but nothing is under way any more
	return m.fail(err)
}

func (m *Machine) abandoned() Effects {
	if m.waiters > 0 || !m.timing {
		return 0
	}
	m.timing = false
	return m.fail(ErrAbandoned) | m.withdraw()
}

func (m *Machine) fail(err error) Effects {
	m.snap.Stage, m.snap.Err = Failed, err
	return Notify | Forget | m.stopTimer()
}

// withdraw is the effect Withdraw, unless that is another API server's to see to.
func (m *Machine) withdraw() Effects {
	if m.elsewhere {
		return 0
	}
	return Withdraw
}

// takenOver leaves the job to another API server: at once where nobody waits
// here, otherwise when they have gone.
func (m *Machine) takenOver() Effects {
	m.elsewhere = true
	if m.waiters > 0 {
		return 0
	}
	return m.fail(ErrAbandoned)
}

// updated takes in news of the job. The attempt is a fencing number: what is
// said of an older one than was heard of already changes nothing.
func (m *Machine) updated(u *queuepb.Update) Effects {
	attempt := u.GetAttempt()
	if m.snap.Ended() {
		// Another delivery of a job that has ended: nobody needs it.
		if m.snap.Stage == Completed && u.GetStage() != queuepb.Update_COMPLETED &&
			(attempt > m.snap.Attempt || u.GetStage() == queuepb.Update_REQUEUED) {
			return Withdraw
		}
		return 0
	}
	if attempt == 0 || attempt < m.snap.Attempt || m.snap.Stage < Queued {
		return 0
	}
	if attempt > m.snap.Attempt {
		m.progress = unheard
	}
	switch u.GetStage() {
	case queuepb.Update_EXECUTING:
		return m.news(u, executing)
	case queuepb.Update_REQUEUED:
		return m.news(u, requeued)
	case queuepb.Update_COMPLETED:
		var withdraw Effects
		if m.progress == requeued {
			withdraw = Withdraw // the job waits for another worker already
		}
		m.attempt(attempt)
		m.snap.Worker = u.GetWorker()
		return m.complete(u.GetExecuteResponse()) | withdraw
	}
	return 0
}

// news takes in progress, if it is some.
func (m *Machine) news(u *queuepb.Update, p progress) Effects {
	if p < m.progress || (p == m.progress && p == requeued) {
		return 0
	}
	m.progress = p
	m.attempt(u.GetAttempt())
	m.snap.StdoutStream = cmp.Or(u.GetStdoutStreamName(), m.snap.StdoutStream)
	m.snap.StderrStream = cmp.Or(u.GetStderrStreamName(), m.snap.StderrStream)
	if p == requeued {
		m.snap.Stage, m.snap.Worker, m.snap.Metadata = Queued, "", nil
		m.snap.StdoutStream, m.snap.StderrStream = "", ""
	} else {
		m.snap.Stage, m.snap.Worker, m.snap.Metadata = Executing, u.GetWorker(), u.GetPartialMetadata()
	}
	return Notify
}

// attempt notes which attempt was heard of last. What an older one printed is not
// what comes of this one.
func (m *Machine) attempt(attempt uint32) {
	if attempt > m.snap.Attempt {
		m.snap.StdoutStream, m.snap.StderrStream = "", ""
	}
	m.snap.Attempt = attempt
}

func (m *Machine) complete(response []byte) Effects {
	m.snap.Stage, m.snap.Response = Completed, response
	return Notify | Retire | m.stopTimer()
}

func (m *Machine) stopTimer() Effects {
	if !m.timing {
		return 0
	}
	m.timing = false
	return StopTimer
}
