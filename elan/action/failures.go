package action

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// failedInstance is what the instances of failed results begin with. No client's
// instance name does: "actions" is no segment of one (remote_execution.proto).
const failedInstance = "actions/failed"

// FailedInstance is the name under which the failed results of an instance can be
// asked for: GetActionResult with it as the instance_name gives one to a person's
// tool, and nothing that builds ever asks so.
func FailedInstance(instance string) string {
	if instance == "" {
		return failedInstance
	}
	return failedInstance + "/" + instance
}

// CutFailedInstance is the reverse of FailedInstance. It reports false for all
// other names.
func CutFailedInstance(name string) (instance string, ok bool) {
	rest, ok := strings.CutPrefix(name, failedInstance)
	if !ok || rest == "" {
		return "", ok
	}
	return strings.CutPrefix(rest, "/")
}

// Failure is one execution that failed, for a person to look at.
type Failure struct {
	FailureInfo
	// Response is what the client was told. Its result's outputs, stdout and
	// stderr are blobs, which may be gone.
	Response *repb.ExecuteResponse
}

// FailureInfo is what a listing tells of a Failure.
type FailureInfo struct {
	Key  blob.EntryKey
	Time time.Time
	// ExitCode is the command's. Status is empty, or what else went wrong.
	ExitCode int32
	Status   string
}

// FailuresOptions are those of NewFailures.
type FailuresOptions struct {
	// Entries holds the failures, beside the results that are served.
	Entries blob.Entries
	// MaxAge is for how long a failure can be looked at; 0 means 3 days, a long
	// weekend. The store may evict it before, as it does with everything.
	MaxAge time.Duration
	// MaxListed is how many failures a listing has at most; 0 means 512. Of two
	// that share a place in it, the later one is listed.
	MaxListed int
	// MaxResultBytes bounds a failure as it is stored; 0 means 1 MiB.
	MaxResultBytes int
}

// Failures keeps results of failed commands apart from those that a Cache serves,
// in the same Entries under names of their own. They are bounded as all entries
// are, by the store, and expire. It is safe for concurrent use, by several
// servers too.
type Failures struct {
	o FailuresOptions
}

// NewFailures checks the options. What it returns needs no closing.
func NewFailures(o FailuresOptions) (*Failures, error) {
	if o.Entries == nil {
		return nil, errors.New("failed actions: FailuresOptions need Entries")
	}
	if o.MaxAge < 0 || o.MaxListed < 0 || o.MaxResultBytes < 0 {
		return nil, errors.New("failed actions: negative limit")
	}
	o.MaxAge = cmp.Or(o.MaxAge, 72*time.Hour)
	o.MaxListed = cmp.Or(o.MaxListed, 512)
	o.MaxResultBytes = cmp.Or(o.MaxResultBytes, 1<<20)
	return &Failures{o: o}, nil
}

// MaxAge is for how long a failure can be looked at.
func (f *Failures) MaxAge() time.Duration { return f.o.MaxAge }

// A stored failure is failureMagic, the time in nanoseconds since 1970 as 8 bytes
// big-endian, and the ExecuteResponse. The magic begins a group, which no
// ActionResult has, so that nothing reads it as one by mistake.
const (
	failureMagic  = "\xfb\x07MF1"
	failureHeader = len(failureMagic) + 8
)

// Put keeps the response to an execution of k that failed, in place of an older
// one of the same action. It neither changes nor keeps resp, and drops its inline
// contents: they are blobs too. A response that is not of a failure wraps
// ErrInvalid, and one that is over the limit blob.ErrTooLarge.
func (f *Failures) Put(ctx context.Context, k blob.EntryKey, resp *repb.ExecuteResponse) error {
	if err := f.put(ctx, k, resp); err != nil {
		return fmt.Errorf("keep the failure of action %s: %w", k.Action, err)
	}
	return nil
}

func (f *Failures) put(ctx context.Context, k blob.EntryKey, resp *repb.ExecuteResponse) error {
	if resp.GetResult() == nil || resp.Result.ExitCode == 0 && resp.Status.GetCode() == 0 {
		return fmt.Errorf("%w: it did not fail, or has no result", ErrInvalid)
	}
	resp = proto.CloneOf(resp)
	stripInline(resp.Result)
	now := time.Now()
	value := binary.BigEndian.AppendUint64([]byte(failureMagic), uint64(now.UnixNano())) //nolint:gosec // not before 1970
	value, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend(value, resp)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if len(value) > f.o.MaxResultBytes {
		return fmt.Errorf("%w: %d bytes, at most %d are kept", blob.ErrTooLarge, len(value), f.o.MaxResultBytes)
	}
	if err := f.o.Entries.PutEntry(ctx, failureKey(k), value); err != nil {
		return err
	}
	listed, err := json.Marshal(listing{
		Instance: k.Instance, Action: k.Action.String(), Time: now,
		ExitCode: resp.Result.ExitCode, Status: statusText(resp),
	})
	if err != nil {
		return err
	}
	return f.o.Entries.PutEntry(ctx, f.place(k), listed)
}

// Get returns the last failure of an action. Where there is none that is young
// enough, the error wraps blob.ErrNotFound. Whether its blobs are still there is
// not looked at.
func (f *Failures) Get(ctx context.Context, k blob.EntryKey) (*Failure, error) {
	value, err := f.o.Entries.Entry(ctx, failureKey(k))
	if err != nil {
		return nil, fmt.Errorf("failure of action %s: %w", k.Action, err)
	}
	body, ok := bytes.CutPrefix(value, []byte(failureMagic))
	resp := &repb.ExecuteResponse{}
	if !ok || len(value) < failureHeader || proto.Unmarshal(body[8:], resp) != nil {
		return nil, fmt.Errorf("failure of action %s: %w: its entry is damaged", k.Action, blob.ErrNotFound)
	}
	at := time.Unix(0, int64(binary.BigEndian.Uint64(body))) //nolint:gosec // as put wrote it
	if time.Since(at) > f.o.MaxAge {
		return nil, fmt.Errorf("failure of action %s: %w: it is older than %v", k.Action, blob.ErrNotFound, f.o.MaxAge)
	}
	return &Failure{
		FailureInfo: FailureInfo{Key: k, Time: at, ExitCode: resp.GetResult().GetExitCode(), Status: statusText(resp)},
		Response:    resp,
	}, nil
}

// listing is one place of the list, as it is stored.
type listing struct {
	Instance string    `json:"instance,omitempty"`
	Action   string    `json:"action"`
	Time     time.Time `json:"time"`
	ExitCode int32     `json:"exit_code,omitempty"`
	Status   string    `json:"status,omitempty"`
}

// listReads is how many places of the list are read at once: enough to hide the
// latency of a bucket.
const listReads = 16

// List returns the failures of the last time, of all instances, the latest first:
// nearly all of the last hundred, and fewer of those before. It reads as many
// entries as it may have.
func (f *Failures) List(ctx context.Context) ([]FailureInfo, error) {
	infos := make([]FailureInfo, f.o.MaxListed)
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(listReads)
	for i := range infos {
		group.Go(func() error {
			value, err := f.o.Entries.Entry(groupCtx, placeKey(i))
			if errors.Is(err, blob.ErrNotFound) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("list failed actions: %w", err)
			}
			infos[i] = readListing(value)
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	infos = slices.DeleteFunc(infos, func(i FailureInfo) bool {
		return i.Key.Action.IsZero() || time.Since(i.Time) > f.o.MaxAge
	})
	slices.SortFunc(infos, func(a, b FailureInfo) int { return b.Time.Compare(a.Time) })
	return infos, nil
}

// readListing is the zero FailureInfo for what is damaged.
func readListing(value []byte) FailureInfo {
	var l listing
	if err := json.Unmarshal(value, &l); err != nil {
		return FailureInfo{}
	}
	d, err := digest.Parse(l.Action)
	if err != nil {
		return FailureInfo{}
	}
	return FailureInfo{Key: blob.EntryKey{Instance: l.Instance, Action: d}, Time: l.Time, ExitCode: l.ExitCode, Status: l.Status}
}

func failureKey(k blob.EntryKey) blob.EntryKey {
	return blob.EntryKey{Instance: FailedInstance(k.Instance), Action: k.Action}
}

// place is the entry in which k is listed, the same each time: an action that
// fails again takes its own place.
func (f *Failures) place(k blob.EntryKey) blob.EntryKey {
	h := fnv.New64a()
	h.Write([]byte(k.Action.String() + "/" + k.Instance))
	return placeKey(int(h.Sum64() % uint64(f.o.MaxListed))) //nolint:gosec // neither is negative
}

// placeKey is place i of the list. Its instance is no FailedInstance.
func placeKey(i int) blob.EntryKey {
	return blob.EntryKey{Instance: "actions/failures", Action: digest.Of(digest.SHA256, fmt.Appendf(nil, "place %d", i))}
}

// statusText is what a response says beside the exit code.
func statusText(resp *repb.ExecuteResponse) string {
	if resp.Status.GetCode() == 0 {
		return ""
	}
	return resp.Status.GetMessage()
}

// stripInline takes the contents out of r that are blobs as well.
func stripInline(r *repb.ActionResult) {
	if r.StdoutDigest != nil {
		r.StdoutRaw = nil
	}
	if r.StderrDigest != nil {
		r.StderrRaw = nil
	}
	for _, f := range r.OutputFiles {
		f.Contents = nil
	}
}
