package nats

import (
	"crypto/sha256"
	"encoding/base32"
	"strconv"
	"strings"
)

// What Options.Prefix may be: part of the names of streams, where NATS allows
// less than in subjects.
const maxPrefix = 32

func isPrefix(s string) bool {
	return s != "" && len(s) <= maxPrefix && strings.IndexFunc(s, func(r rune) bool { return !isPlain(r) }) < 0
}

func isPlain(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_'
}

// The bands of priority, the urgent one first.
const (
	bandUrgent = iota // below 0
	bandNormal        // 0
	bandLow           // above 0
	bands
)

func band(priority int32) int {
	switch {
	case priority < 0:
		return bandUrgent
	case priority == 0:
		return bandNormal
	default:
		return bandLow
	}
}

// maxToken bounds what token leaves readable.
const maxToken = 64

// token makes a part of a subject, and of a consumer's name, of s: different ones
// of different strings. Pools and API servers stay readable where they can.
func token(s string) string {
	if s == "" {
		return "="
	}
	var b strings.Builder
	for i := range len(s) {
		if isPlain(rune(s[i])) {
			b.WriteByte(s[i])
		} else {
			b.WriteByte('=')
			b.WriteString(strconv.FormatUint(uint64(s[i])|0x100, 16)[1:])
		}
	}
	if b.Len() > maxToken {
		return "==" + hash(s)
	}
	return b.String()
}

// hash stands for the name of an operation in subjects.
func hash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return base32.HexEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:20])
}

// The streams.
func (q *Queue) jobsStream() string    { return q.opts.Prefix + "_jobs" }
func (q *Queue) leasesStream() string  { return q.opts.Prefix + "_leases" }
func (q *Queue) updatesStream() string { return q.opts.Prefix + "_updates" }

// The subjects of the streams.
func (q *Queue) jobSubject(pool string, band int, operation string) string {
	return q.poolSubject(pool, band, hash(operation))
}

// poolSubject is that of all jobs of a band of a pool where what is *.
func (q *Queue) poolSubject(pool string, band int, what string) string {
	return q.opts.Prefix + ".jobs." + token(pool) + "." + strconv.Itoa(band) + "." + what
}

// anyJobSubject is that of the job of an operation in whichever pool.
func (q *Queue) anyJobSubject(operation string) string {
	return q.opts.Prefix + ".jobs.*.*." + hash(operation)
}

func (q *Queue) leaseSubject(operation string) string {
	return q.opts.Prefix + ".leases." + hash(operation)
}

func (q *Queue) updateSubject(api, operation string) string {
	return q.opts.Prefix + ".updates." + token(api) + "." + hash(operation)
}

// The subjects that no stream listens to: they spare waiting, and nothing is lost
// where a message on them is.

// workerSubject is where the holder of leases is told to look at a record.
func (q *Queue) workerSubject(id string) string { return q.opts.Prefix + ".workers." + id }

// noteSubject is where an API server is told that a worker has taken a job.
func (q *Queue) noteSubject(api string) string { return q.opts.Prefix + ".notes." + token(api) }

// noticeSubject is that of the notices to all API servers; with one's token
// behind it, that of the ones which are repeated to it.
func (q *Queue) noticeSubject() string { return q.opts.Prefix + ".notices" }

// helloSubject is where an API server that begins to listen says so.
func (q *Queue) helloSubject() string { return q.opts.Prefix + ".hello" }

// nextSubject is where a consumer of the jobs is asked for some.
func (q *Queue) nextSubject(consumer string) string {
	return q.apiPrefix() + ".CONSUMER.MSG.NEXT." + q.jobsStream() + "." + consumer
}

// apiPrefix begins the subjects of JetStream's own interface.
func (q *Queue) apiPrefix() string {
	if q.opts.Domain != "" {
		return "$JS." + q.opts.Domain + ".API"
	}
	return "$JS.API"
}

func consumerName(pool string, band int) string {
	return "pool_" + token(pool) + "_" + strconv.Itoa(band)
}

func inboxName(api string) string { return "api_" + token(api) }
