package doctor

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// actionTimeout is how long the action is waited for: a worker may have to be
// started first.
const actionTimeout = 2 * time.Minute

// action runs one action, twice.
func (p *patient) action(ctx context.Context) bool {
	if p.o.NoExecution || !p.caps.GetExecutionCapabilities().GetExecEnabled() {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, actionTimeout)
	defer cancel()
	word := rand.Text()
	d, err := p.prepare(ctx, word)
	if err != nil {
		return p.fail("an action", err)
	}
	before := time.Now()
	resp, stages, err := p.execute(ctx, d)
	after := time.Now()
	switch {
	case err != nil && ctx.Err() != nil:
		p.add(Failure, "an action", "no worker took it: are there any, in the pool whose properties the action asks for (--platform)?", "it was %s for %v", stages, after.Sub(before).Round(100*time.Millisecond))
		return false
	case err != nil:
		return p.fail("an action", err)
	case resp.GetStatus().GetCode() != 0:
		return p.fail("an action", status.ErrorProto(resp.GetStatus()))
	case resp.GetResult().GetExitCode() != 0:
		p.add(Failure, "an action", "workers need /bin/sh for this, and for most builds", "/bin/sh ended with %d: %s", resp.GetResult().GetExitCode(), resp.GetMessage())
		return false
	}
	if got, err := p.printed(ctx, resp.GetResult()); err != nil || got != word+"\n" {
		p.add(Failure, "an action", "the workers' storage is not that of the clients", "it ran, and what it printed is %q, %v", got, err)
		return false
	}
	m := resp.GetResult().GetExecutionMetadata()
	p.add(OK, "an action", "", "ran on %s, %.1f ms for the client, of which %.1f in the queue and %.1f the command",
		m.GetWorker(), ms(after.Sub(before)), ms(between(m.GetQueuedTimestamp(), m.GetWorkerStartTimestamp())), ms(between(m.GetExecutionStartTimestamp(), m.GetExecutionCompletedTimestamp())))
	p.clocks(m, before, after)
	p.again(ctx, d)
	return true
}

// prepare stores an action that prints a word.
func (p *patient) prepare(ctx context.Context, word string) (digest.Digest, error) {
	fn := p.function()
	platform := &repb.Platform{Properties: p.o.Platform}
	cmd, err := blob.PutMessage(ctx, p.o.Store, fn, &repb.Command{Arguments: []string{"/bin/sh", "-c", "echo " + word}, Platform: platform})
	if err != nil {
		return digest.Digest{}, err
	}
	root, err := blob.PutMessage(ctx, p.o.Store, fn, &repb.Directory{})
	if err != nil {
		return digest.Digest{}, err
	}
	return blob.PutMessage(ctx, p.o.Store, fn, &repb.Action{
		CommandDigest: cmd.Proto(), InputRootDigest: root.Proto(), Platform: platform, Timeout: durationpb.New(time.Minute),
	})
}

// execute follows an execution to its end. The stages are those that it came
// through.
func (p *patient) execute(ctx context.Context, d digest.Digest) (resp *repb.ExecuteResponse, stages string, err error) {
	s, err := repb.NewExecutionClient(p.o.Conn).Execute(ctx, &repb.ExecuteRequest{
		InstanceName: p.o.Instance, ActionDigest: d.Proto(), DigestFunction: d.Function().Proto(),
	})
	if err != nil {
		return nil, "", err
	}
	var seen []string
	for {
		op, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil, "", errors.New("the stream has ended before the action did: something between cuts long calls")
		}
		if err != nil {
			return nil, strings.Join(seen, ", then "), err
		}
		md := &repb.ExecuteOperationMetadata{}
		if op.GetMetadata().UnmarshalTo(md) == nil {
			seen = append(seen, strings.ToLower(md.GetStage().String()))
		}
		if op.GetDone() {
			resp := &repb.ExecuteResponse{}
			if err := op.GetResponse().UnmarshalTo(resp); err != nil {
				return nil, "", fmt.Errorf("the response: %w", err)
			}
			return resp, strings.Join(seen, ", then "), nil
		}
	}
}

// printed is what the action printed.
func (p *patient) printed(ctx context.Context, r *repb.ActionResult) (string, error) {
	if len(r.GetStdoutRaw()) > 0 || r.GetStdoutDigest() == nil {
		return string(r.GetStdoutRaw()), nil
	}
	d, err := digest.FromProto(p.function(), r.GetStdoutDigest())
	if err != nil {
		return "", err
	}
	data, err := blob.ReadAll(ctx, p.o.Store, d, 1<<10)
	return string(data), err
}

// maxSkew is how far clocks may be apart before somebody wonders.
const maxSkew = 2 * time.Second

// clocks compares those of the server and the worker with this machine's.
func (p *patient) clocks(m *repb.ExecutedActionMetadata, before, after time.Time) {
	worst := time.Duration(0)
	for _, t := range []*timestamppb.Timestamp{m.GetQueuedTimestamp(), m.GetWorkerStartTimestamp(), m.GetWorkerCompletedTimestamp()} {
		if !t.IsValid() {
			continue
		}
		if d := before.Sub(t.AsTime()); d > worst {
			worst = d
		}
		if d := t.AsTime().Sub(after); d > worst {
			worst = d
		}
	}
	if worst > maxSkew {
		p.add(Warning, "clocks", "set them by NTP: tokens expire, and times of actions are read, by clocks", "the server's or the worker's is %v apart from this machine's", worst.Round(time.Second))
		return
	}
	p.add(OK, "clocks", "", "agree")
}

// again asks for the same action.
func (p *patient) again(ctx context.Context, d digest.Digest) {
	start := time.Now()
	resp, _, err := p.execute(ctx, d)
	switch {
	case err != nil:
		p.fail("the same action again", err)
	case !resp.GetCachedResult():
		p.add(Warning, "the same action again", "the server keeps no results, so that each build executes all of its actions", "was executed again")
	default:
		p.add(OK, "the same action again", "", "from the cache, in %.1f ms", ms(time.Since(start)))
	}
}

// between is the time from a to b, where both are known.
func between(a, b *timestamppb.Timestamp) time.Duration {
	if !a.IsValid() || !b.IsValid() {
		return 0
	}
	return b.AsTime().Sub(a.AsTime())
}
