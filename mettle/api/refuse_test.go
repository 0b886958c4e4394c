package api_test

import (
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/api"
)

func TestExecute_refuses(t *testing.T) {
	sha := digest.Of(digest.SHA256, []byte("x"))
	long := strings.Repeat("x", 2000)
	for name, tc := range map[string]struct {
		req    *repb.ExecuteRequest
		action func(*repb.Action, *repb.Command)
		code   codes.Code
		say    string
	}{
		"no digest":          {req: &repb.ExecuteRequest{}, say: "action_digest"},
		"empty digest":       {req: &repb.ExecuteRequest{ActionDigest: &repb.Digest{}}, say: "action_digest"},
		"short hash":         {req: &repb.ExecuteRequest{ActionDigest: &repb.Digest{Hash: "abc", SizeBytes: 1}}, say: "action_digest"},
		"upper case":         {req: &repb.ExecuteRequest{ActionDigest: &repb.Digest{Hash: strings.ToUpper(sha.Hash()), SizeBytes: 1}}, say: "lower-case"},
		"negative size":      {req: &repb.ExecuteRequest{ActionDigest: &repb.Digest{Hash: sha.Hash(), SizeBytes: -1}}, say: "negative"},
		"terabytes":          {req: &repb.ExecuteRequest{ActionDigest: &repb.Digest{Hash: sha.Hash(), SizeBytes: 1 << 42}}, say: "too large"},
		"another function":   {req: &repb.ExecuteRequest{ActionDigest: sha.Proto(), DigestFunction: repb.DigestFunction_SHA512}, say: "sha512"},
		"unknown function":   {req: &repb.ExecuteRequest{ActionDigest: sha.Proto(), DigestFunction: repb.DigestFunction_MD5}, say: "MD5"},
		"long instance":      {req: &repb.ExecuteRequest{ActionDigest: sha.Proto(), InstanceName: long}, say: "instance"},
		"keyword instance":   {req: &repb.ExecuteRequest{ActionDigest: sha.Proto(), InstanceName: "actions/failed"}, say: "segment \"actions\""},
		"NUL in instance":    {req: &repb.ExecuteRequest{ActionDigest: sha.Proto(), InstanceName: "\x00"}, say: "instance"},
		"no command digest":  {action: func(a *repb.Action, _ *repb.Command) { a.CommandDigest = &repb.Digest{} }, say: "command_digest"},
		"no input root":      {action: func(a *repb.Action, _ *repb.Command) { a.InputRootDigest = nil }, say: "input_root_digest"},
		"no arguments":       {action: func(_ *repb.Action, c *repb.Command) { c.Arguments = nil }, say: "arguments"},
		"escaping output":    {action: func(_ *repb.Action, c *repb.Command) { c.OutputPaths = []string{"../x"} }, say: "output"},
		"negative timeout":   {action: timeoutOf(-time.Second), say: "negative"},
		"too long a timeout": {action: timeoutOf(25 * time.Hour), say: "24h0m0s"},
		"odd timeout": {action: func(a *repb.Action, _ *repb.Command) {
			timeoutOf(0)(a, nil)
			a.Timeout.Nanos = -5
			a.Timeout.Seconds = 5
		}, say: "timeout"},
		"a platform nobody serves": {
			action: func(a *repb.Action, _ *repb.Command) {
				a.Platform = &repb.Platform{Properties: []*repb.Platform_Property{{Name: "OSFamily", Value: "windows"}}}
			},
			code: codes.FailedPrecondition, say: "OSFamily",
		},
		"in the command only": {
			action: func(_ *repb.Action, c *repb.Command) {
				c.Platform = &repb.Platform{Properties: []*repb.Platform_Property{{Name: "container-image", Value: "docker://x"}}}
			},
			code: codes.FailedPrecondition, say: "container-image",
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *bench) {
				if tc.action != nil {
					tc.req = &repb.ExecuteRequest{ActionDigest: b.store.action("a", tc.action)}
				}
				if tc.code == codes.OK {
					tc.code = codes.InvalidArgument
				}
				s := b.execute(tc.req).err(tc.code)
				if !strings.Contains(s.Message(), tc.say) {
					t.Errorf("%q does not mention %q", s.Message(), tc.say)
				}
				b.noLease()
			})
		})
	}
}

func TestExecute_malformedMessages(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		junk := []byte{0xff, 0xff, 0xff}
		d := b.store.putBytes(digest.Of(digest.SHA256, junk), junk)
		b.executeAction(d).err(codes.InvalidArgument)
		b.executeAction(b.store.action("a", func(a *repb.Action, _ *repb.Command) { a.CommandDigest = d })).err(codes.InvalidArgument)
		b.executeAction(digest.Empty(digest.SHA256).Proto()).err(codes.FailedPrecondition) // this store lacks even that
	})
}

func TestExecute_timeouts(t *testing.T) {
	for name, tc := range map[string]struct {
		change []func(*repb.Action, *repb.Command)
		want   time.Duration
	}{
		"absent":  {nil, time.Hour},
		"zero":    {[]func(*repb.Action, *repb.Command){timeoutOf(0)}, time.Hour},
		"short":   {[]func(*repb.Action, *repb.Command){timeoutOf(time.Millisecond)}, time.Millisecond},
		"longest": {[]func(*repb.Action, *repb.Command){timeoutOf(24 * time.Hour)}, 24 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *bench) {
				w := b.executeAction(b.store.action("a", tc.change...))
				l := b.lease()
				if got := l.Job().GetTimeout().AsDuration(); got != tc.want {
					t.Errorf("the job's timeout is %v, want %v", got, tc.want)
				}
				// What a timeout ends with comes to the client with the output so far.
				want := exit(0)
				want.Status = &spb.Status{Code: int32(codes.DeadlineExceeded)}
				b.complete(l, want)
				if got := w.response(); !proto.Equal(got, want) {
					t.Errorf("response is %v", got)
				}
			})
		})
	}
}

func TestNew_refuses(t *testing.T) {
	good := func() api.Options {
		b := newBench(t, nil)
		var o api.Options
		b.stop()
		b.start(func(with *api.Options) { o = *with })
		return o
	}()
	for name, change := range map[string]func(*api.Options){
		"no id":            func(o *api.Options) { o.ID = "" },
		"no store":         func(o *api.Options) { o.Store = nil },
		"no action cache":  func(o *api.Options) { o.Actions = nil },
		"no jobs":          func(o *api.Options) { o.Jobs = nil },
		"no updates":       func(o *api.Options) { o.Updates = nil },
		"no platforms":     func(o *api.Options) { o.Platforms = nil },
		"negative timeout": func(o *api.Options) { o.DefaultTimeout = -1 },
		"default over max": func(o *api.Options) { o.DefaultTimeout, o.MaxTimeout = 2, 1 },
		"long keep-alive":  func(o *api.Options) { o.KeepAlive = time.Minute },
		"negative bytes":   func(o *api.Options) { o.MaxActionBytes = -1 },
		"negative abandon": func(o *api.Options) { o.AbandonAfter = -1 },
	} {
		o := good
		change(&o)
		if _, err := api.New(o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestServer_Capabilities(t *testing.T) {
	c := newBench(t, nil).server.Capabilities()
	if !c.GetExecEnabled() || c.GetDigestFunction() != repb.DigestFunction_SHA256 || len(c.GetDigestFunctions()) != len(digest.Functions()) {
		t.Errorf("capabilities are %v", c)
	}
	if r := c.GetExecutionPriorityCapabilities().GetPriorities(); len(r) != 1 || r[0].GetMinPriority() >= 0 || r[0].GetMaxPriority() <= 0 {
		t.Errorf("priorities are %v", r)
	}
}
