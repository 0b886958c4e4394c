package rpc

import (
	"context"
	"errors"
	"fmt"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/status"
	storepb "github.com/mettle-build/mettle/proto/store"
)

// maxInlineBytes bounds each of what is inlined into a result. A larger one is
// better streamed.
const maxInlineBytes = 1 << 20

type actionCacheServer struct {
	repb.UnimplementedActionCacheServer
	o Options
}

// GetActionResult answers with a result whose blobs are all there, and with
// those contents inline that were asked for and fit. In the instances of
// action.FailedInstance it answers with what failed.
func (s *actionCacheServer) GetActionResult(ctx context.Context, req *repb.GetActionResultRequest) (*repb.ActionResult, error) {
	instance, failed := action.CutFailedInstance(req.InstanceName)
	if !failed {
		instance = req.InstanceName
	}
	store, err := s.o.storeOf(instance)
	if err != nil {
		return nil, status.From(err)
	}
	d, err := readDigest(req.DigestFunction, req.ActionDigest)
	if err != nil {
		return nil, status.From(err)
	}
	var r *repb.ActionResult
	if k := (blob.EntryKey{Instance: instance, Action: d}); failed {
		r, err = s.failure(ctx, k)
	} else {
		r, err = s.o.Actions.Get(ctx, k)
	}
	if err != nil {
		return nil, status.FromRead(err)
	}
	if req.InlineStdout || req.InlineStderr || len(req.InlineOutputFiles) > 0 {
		s.inline(ctx, store, req, d.Function(), r)
	}
	return r, nil
}

// failure is the result of an action that failed. What else went wrong than its
// exit code tells, as a timeout, is a google.rpc.Status in the metadata.
func (s *actionCacheServer) failure(ctx context.Context, k blob.EntryKey) (*repb.ActionResult, error) {
	if s.o.Failures == nil {
		return nil, fmt.Errorf("failure of action %s: %w: this server keeps none", k.Action, blob.ErrNotFound)
	}
	f, err := s.o.Failures.Get(ctx, k)
	if err != nil {
		return nil, err //nolint:wrapcheck // it says what of
	}
	return action.FailedResult(f.Response) //nolint:wrapcheck // it says what is wrong
}

// inline follows the hints of req as far as the message has room. A blob that
// can't be read is left for the client to fetch.
func (s *actionCacheServer) inline(ctx context.Context, store blob.Opener, req *repb.GetActionResultRequest, fn digest.Function, r *repb.ActionResult) {
	room := int64(s.o.MaxMessageBytes - batchMargin - proto.Size(r))
	contents := func(m *repb.Digest) []byte {
		d, err := digest.FromProto(fn, m)
		if err != nil || d.Size() > min(room, maxInlineBytes) {
			return nil
		}
		data, err := blob.ReadAll(ctx, store, d, maxInlineBytes)
		if err != nil {
			s.o.Logger.DebugContext(ctx, "could not inline a blob", "digest", d, "error", err)
			return nil
		}
		room -= d.Size()
		return data
	}
	if req.InlineStdout && r.StdoutDigest != nil {
		r.StdoutRaw = contents(r.StdoutDigest)
	}
	if req.InlineStderr && r.StderrDigest != nil {
		r.StderrRaw = contents(r.StderrDigest)
	}
	if len(req.InlineOutputFiles) == 0 {
		return
	}
	wanted := make(map[string]struct{}, len(req.InlineOutputFiles))
	for _, path := range req.InlineOutputFiles {
		wanted[path] = struct{}{}
	}
	for _, f := range r.OutputFiles {
		if _, ok := wanted[f.Path]; ok {
			f.Contents = contents(f.Digest)
		}
	}
}

// UpdateActionResult takes a result whose blobs are all there, of a command that
// succeeded. In the instances of action.FailedInstance it takes what failed, from
// workers that have no other way to this storage.
func (s *actionCacheServer) UpdateActionResult(ctx context.Context, req *repb.UpdateActionResultRequest) (*repb.ActionResult, error) {
	instance, failed := action.CutFailedInstance(req.InstanceName)
	if !failed {
		instance = req.InstanceName
	}
	if _, err := s.o.storeOf(instance); err != nil {
		return nil, status.From(err)
	}
	if err := s.o.Updates.MayUpdate(ctx, instance); err != nil {
		return nil, status.From(err)
	}
	d, err := readDigest(req.DigestFunction, req.ActionDigest)
	if err != nil {
		return nil, status.From(err)
	}
	k := blob.EntryKey{Instance: instance, Action: d}
	switch {
	case !failed:
		if err = s.sign(ctx, req.ActionResult); err == nil {
			err = s.o.Actions.Put(ctx, k, req.ActionResult)
		}
	case s.o.Failures == nil:
		err = fmt.Errorf("failure of action %s: %w: this server keeps none", d, errors.ErrUnsupported)
	default:
		err = s.o.Failures.Put(ctx, k, action.FailedResponse(req.ActionResult))
	}
	if err != nil {
		return nil, status.From(err)
	}
	return req.ActionResult, nil
}

// sign notes in a result who has set it, where that is known. What a client says
// itself of it is dropped, also where nobody knows better.
func (s *actionCacheServer) sign(ctx context.Context, r *repb.ActionResult) error {
	if m := r.GetExecutionMetadata(); m != nil {
		m.AuxiliaryMetadata = slices.DeleteFunc(m.AuxiliaryMetadata, func(a *anypb.Any) bool { return a.MessageIs((*storepb.Producer)(nil)) })
	}
	if s.o.Caller == nil || r == nil {
		return nil
	}
	name, via := s.o.Caller(ctx)
	if name == "" {
		return nil
	}
	producer, err := anypb.New(&storepb.Producer{Identity: name, Via: via, Time: timestamppb.Now()})
	if err != nil {
		return err
	}
	if r.ExecutionMetadata == nil {
		r.ExecutionMetadata = &repb.ExecutedActionMetadata{}
	}
	r.ExecutionMetadata.AuxiliaryMetadata = append(r.ExecutionMetadata.AuxiliaryMetadata, producer)
	return nil
}
