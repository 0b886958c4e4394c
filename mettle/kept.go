package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	spb "google.golang.org/genproto/googleapis/rpc/status"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
)

// showKept prints what the server kept of the run that failed, to out what the
// command printed, and returns how it ended.
func (c *oneCmd) showKept(ctx context.Context, out io.Writer, remote *client.Client, d digest.Digest) error {
	r, err := remote.Get(ctx, blob.EntryKey{Instance: action.FailedInstance(c.Instance), Action: d})
	if errors.Is(err, blob.ErrNotFound) {
		return fmt.Errorf("no failed run of action %s is kept there, or no longer; without --kept it runs here", d)
	}
	if err != nil {
		return err
	}
	for _, s := range []keptStream{
		{"stdout", out, r.GetStdoutRaw(), r.GetStdoutDigest()},
		{"stderr", os.Stderr, r.GetStderrRaw(), r.GetStderrDigest()},
	} {
		if err := s.print(ctx, remote, d.Function()); err != nil {
			fmt.Fprintf(os.Stderr, "mettle: %s can't be shown: %v\n", s.name, err)
		}
	}
	m := r.GetExecutionMetadata()
	fmt.Fprintf(os.Stderr, "mettle: it ran on worker %s and ended at %s\n", m.GetWorker(), m.GetExecutionCompletedTimestamp().AsTime().Format("2006-01-02 15:04:05 MST"))
	for _, any := range m.GetAuxiliaryMetadata() {
		why := &spb.Status{}
		if any.UnmarshalTo(why) == nil {
			return errors.Join(reportResult(r), errors.New(why.GetMessage()))
		}
	}
	return reportResult(r)
}

// keptStream is what a command printed: inline, or a blob.
type keptStream struct {
	name string
	to   io.Writer
	raw  []byte
	blob *repb.Digest
}

func (s keptStream) print(ctx context.Context, remote blob.Opener, fn digest.Function) error {
	if len(s.raw) > 0 || s.blob == nil {
		_, err := s.to.Write(s.raw)
		return err
	}
	d, err := digest.FromProto(fn, s.blob)
	if err != nil {
		return err
	}
	r, err := remote.Open(ctx, d, 0)
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // opened for reading
	_, err = io.Copy(s.to, digest.NewVerifier(r, d))
	return err
}
