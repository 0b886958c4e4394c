package nats

import (
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/code"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// headroom is what a message takes beside its body: subject and headers.
const headroom = 1 << 10

// marshalUpdate makes the body of a message. A response that is too large for the
// broker goes without the contents that are in the CAS as well; if that does not
// do, the client is told that, rather than have one worker after another fail to
// report.
func (q *Queue) marshalUpdate(u *queuepb.Update) ([]byte, error) {
	data, err := proto.Marshal(u)
	limit := q.nc.MaxPayload() - headroom
	if err != nil || int64(len(data)) <= limit || u.GetStage() != queuepb.Update_COMPLETED {
		return data, err
	}
	var resp repb.ExecuteResponse
	if err := proto.Unmarshal(u.GetExecuteResponse(), &resp); err != nil {
		return nil, fmt.Errorf("the response of %s: %w", u.GetOperation(), err)
	}
	before := len(data)
	withoutContents(resp.GetResult())
	slim := proto.CloneOf(u)
	if slim.ExecuteResponse, err = proto.Marshal(&resp); err != nil {
		return nil, err
	}
	if data, err = proto.Marshal(slim); err != nil || int64(len(data)) <= limit {
		return data, err
	}
	r := record{Operation: u.GetOperation(), Attempt: u.GetAttempt(), Worker: u.GetWorker()}
	return proto.Marshal(failed(r, &spb.Status{
		Code:    int32(code.Code_RESOURCE_EXHAUSTED),
		Message: fmt.Sprintf("the response takes %d bytes, more than the %d that the broker passes on", before, limit),
	}))
}

// withoutContents takes out what is in the CAS as well.
func withoutContents(r *repb.ActionResult) {
	if r == nil {
		return
	}
	if r.GetStdoutDigest() != nil {
		r.StdoutRaw = nil
	}
	if r.GetStderrDigest() != nil {
		r.StderrRaw = nil
	}
	for _, f := range r.GetOutputFiles() {
		f.Contents = nil
	}
}
