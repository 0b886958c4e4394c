package action

import (
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// FailedResult is the response to an execution that failed in the form in which
// the ActionCache service has it, in the instances of FailedInstance. What went
// wrong beside the exit code, as a timeout, is a google.rpc.Status at the end of
// the auxiliary metadata. It does not change resp. Errors wrap ErrInvalid.
func FailedResult(resp *repb.ExecuteResponse) (*repb.ActionResult, error) {
	if resp.GetResult() == nil {
		return nil, fmt.Errorf("%w: a failure without a result", ErrInvalid)
	}
	if resp.Status.GetCode() == 0 {
		return resp.Result, nil
	}
	why, err := anypb.New(resp.Status)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	r := proto.CloneOf(resp.Result)
	if r.ExecutionMetadata == nil {
		r.ExecutionMetadata = &repb.ExecutedActionMetadata{}
	}
	r.ExecutionMetadata.AuxiliaryMetadata = append(r.ExecutionMetadata.AuxiliaryMetadata, why)
	return r, nil
}

// FailedResponse is the reverse of FailedResult. It does not change r.
func FailedResponse(r *repb.ActionResult) *repb.ExecuteResponse {
	resp := &repb.ExecuteResponse{Result: r}
	aux := r.GetExecutionMetadata().GetAuxiliaryMetadata()
	if len(aux) == 0 {
		return resp
	}
	why := &spb.Status{}
	if aux[len(aux)-1].UnmarshalTo(why) != nil {
		return resp
	}
	resp.Status, resp.Result = why, proto.CloneOf(r)
	resp.Result.ExecutionMetadata.AuxiliaryMetadata = resp.Result.ExecutionMetadata.AuxiliaryMetadata[:len(aux)-1]
	return resp
}
