package pubsub

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
)

// The attributes of messages, on which the subscriptions' filters are.
const (
	attrOperation   = "operation"
	attrPool        = "pool"
	attrBand        = "band"
	attrReplyTo     = "reply_to"
	attrPublication = "publication"  // random, one a Publish
	attrBase        = "attempt_base" // what attempts are counted from
	attrSeq         = "seq"          // of an update or a notice, rising
	attrProcess     = "process"      // of a notice: who sent it
	attrReason      = "reason"       // of a final update by the broker
	attrDelivered   = "delivered"    // history: see there
	attrFailed      = "failed"
	attrFailure     = "failure_" // and the number of the attempt, from the base
	attrAvoid       = "avoid"
	attrPublished   = "published" // when the job was published first, in nanoseconds since 1970
	attrRun         = "run"       // of an update: names one delivery
	attrUncounted   = "uncounted" // of an update: the broker does not count deliveries
	attrReleased    = "released"  // of an update: the attempt was no failure
	attrHello       = "hello"     // to workers: the API server that has begun to listen
	attrWithdrawn   = "withdrawn" // of a cancellation: publications
)

// The bands of priorities, the most urgent first.
const (
	bandUrgent = "urgent" // below 0
	bandNormal = "normal" // 0, the default
	bandLow    = "low"    // above 0
)

// bands are those in use, in the order in which they are asked.
func (o Options) bands() []string {
	if o.OneBand {
		return []string{bandNormal}
	}
	return []string{bandUrgent, bandNormal, bandLow}
}

func (o Options) band(priority int32) string {
	switch {
	case o.OneBand || priority == 0:
		return bandNormal
	case priority < 0:
		return bandUrgent
	}
	return bandLow
}

func (q *Queue) topic(name string) string {
	return fmt.Sprintf("projects/%s/topics/%s-%s", q.opts.Project, q.opts.Prefix, name)
}

func (q *Queue) subscription(parts ...string) string {
	return fmt.Sprintf("projects/%s/subscriptions/%s-%s", q.opts.Project, q.opts.Prefix, strings.Join(parts, "-"))
}

func (q *Queue) jobSubscription(pool, band string) string {
	return q.subscription("jobs", token(pool), band)
}

func (q *Queue) replySubscription(id string) string { return q.subscription("updates", token(id)) }

func (q *Queue) cancelSubscription() string { return q.subscription("cancel", q.id) }

func (q *Queue) noticeSubscription(id string) string { return q.subscription("notices", token(id)) }

func (q *Queue) deadSubscription() string { return q.subscription("dead") }

func jobFilter(pool, band string) string {
	return fmt.Sprintf(`attributes.%s = "%s" AND attributes.%s = "%s"`, attrPool, token(pool), attrBand, band)
}

func replyFilter(id string) string {
	return fmt.Sprintf(`attributes.%s = "%s"`, attrReplyTo, token(id))
}

// token is s where it may be part of a subscription's name and of a filter, and
// otherwise a hash of it.
func token(s string) string {
	if len(s) <= 60 && isPlain("a"+s) && !strings.HasPrefix(s, "x-") {
		return s
	}
	sum := sha256.Sum256([]byte(s))
	return "x-" + hex.EncodeToString(sum[:12])
}

// isPlain reports whether s is of letters, digits, dashes and underscores, a
// letter first.
func isPlain(s string) bool {
	for i, c := range []byte(s) {
		letter := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
		if !letter && (i == 0 || (c < '0' || c > '9') && c != '-' && c != '_') {
			return false
		}
	}
	return s != ""
}
