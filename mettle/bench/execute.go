package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/digest"
)

// saltVariable is in the environment of every action.
const saltVariable = "METTLE_BENCH_SALT"

func actionScenarios(o Options) []scenario {
	var plan []scenario
	for _, n := range o.Concurrency {
		plan = append(plan, scenario{
			name: "unique /bin/true", clients: n, unit: "actions/s", perOp: 1,
			floor: floorSpawn, floorPerOp: 1, prepare: prepareTrivial,
		})
	}
	return plan
}

func sandboxedScenarios(o Options) []scenario {
	plan := actionScenarios(o)
	for i := range plan {
		plan[i].floor, plan[i].prepare = floorNamespaces, prepareSandboxed
	}
	return plan
}

func latencyScenarios(Options) []scenario {
	return []scenario{{
		name: "unique /bin/true", clients: 1, unit: "actions/s", perOp: 1,
		floor: floorSpawn, floorPerOp: 1, prepare: prepareTrivial,
	}}
}

func cachedScenarios(o Options) []scenario {
	return []scenario{{
		name: "Execute, cached", clients: o.Concurrency[0], unit: "calls/s", perOp: 1,
		floor: floorUnary, floorPerOp: 1, prepare: prepareCached,
	}}
}

func actionCacheScenarios(o Options) []scenario {
	return []scenario{{
		name: "GetActionResult", clients: o.Concurrency[0], unit: "calls/s", perOp: 1,
		floor: floorUnary, floorPerOp: 1, prepare: prepareActionCache,
	}}
}

func action50Scenarios(o Options) []scenario {
	return []scenario{{
		name: "50 inputs, 5 outputs", clients: o.Concurrency[0], unit: "actions/s", perOp: 1,
		floor: floorSpawn, floorPerOp: 1, prepare: prepareAction50,
	}}
}

// prepareTrivial is for actions that run /bin/true in an empty directory. One op
// is a BatchUpdateBlobs of Action and Command, and an Execute to its end.
func prepareTrivial(ctx context.Context, c *client) (op, error) {
	if err := c.needExecution(); err != nil {
		return nil, err
	}
	root, err := c.message(&repb.Directory{})
	if err != nil {
		return nil, err
	}
	if err := c.upload(ctx, root); err != nil {
		return nil, err
	}
	salt := newSalt()
	return func(ctx context.Context, n uint64) error {
		_, err := c.runAction(ctx, trivialCommand(salt, n), root.digest)
		return err
	}, nil
}

// ownNamespaces prints in which namespaces a process is.
const ownNamespaces = "for n in user mnt pid; do readlink /proc/self/ns/$n; done"

// prepareSandboxed is prepareTrivial of a server that runs actions in namespaces
// other than those of this process.
func prepareSandboxed(ctx context.Context, c *client) (op, error) {
	f, err := prepareTrivial(ctx, c)
	if err != nil {
		return nil, err
	}
	theirs, err := c.output(ctx, ownNamespaces)
	if err != nil {
		return nil, err
	}
	links := strings.Fields(theirs)
	if len(links) != 3 {
		return nil, fmt.Errorf("%w: the server's actions do not tell their namespaces: %.100q", errSkip, theirs)
	}
	for _, l := range links {
		kind, _, _ := strings.Cut(l, ":")
		if ours, err := os.Readlink("/proc/self/ns/" + kind); err == nil && ours == l {
			return nil, fmt.Errorf("%w: the server's actions are in the %s namespace that this process is in, so they are in no sandbox", errSkip, kind)
		}
	}
	return f, nil
}

// output runs a shell command in an empty directory, and returns what it prints.
func (c *client) output(ctx context.Context, script string) (string, error) {
	a, cmd, err := c.action(&repb.Command{
		Arguments:            []string{"/bin/sh", "-c", script},
		EnvironmentVariables: append(saltEnv(newSalt(), 0), &repb.Command_EnvironmentVariable{Name: "PATH", Value: "/usr/bin:/bin"}),
	}, digest.Empty(c.fn))
	if err != nil {
		return "", err
	}
	if err := c.upload(ctx, a, cmd); err != nil {
		return "", err
	}
	last, err := c.operation(ctx, a.digest)
	if err != nil {
		return "", err
	}
	resp, err := last.decode()
	if err != nil {
		return "", err
	}
	r := resp.GetResult()
	if len(r.GetStdoutRaw()) > 0 || r.GetStdoutDigest() == nil {
		return string(r.GetStdoutRaw()), nil
	}
	got, err := c.cas.BatchReadBlobs(ctx, &repb.BatchReadBlobsRequest{
		InstanceName: c.instance, DigestFunction: c.fn.Proto(), Digests: []*repb.Digest{r.GetStdoutDigest()},
	})
	if err != nil || len(got.GetResponses()) != 1 {
		return "", fmt.Errorf("BatchReadBlobs of stdout: %d blobs, %w", len(got.GetResponses()), err)
	}
	return string(got.GetResponses()[0].GetData()), nil
}

func trivialCommand(salt string, n uint64) *repb.Command {
	return &repb.Command{Arguments: []string{"/bin/true"}, EnvironmentVariables: saltEnv(salt, n)}
}

// saltEnv is an environment that makes a Command and its Action unlike any other.
func saltEnv(salt string, n uint64) []*repb.Command_EnvironmentVariable {
	return []*repb.Command_EnvironmentVariable{{Name: saltVariable, Value: salt + "-" + strconv.FormatUint(n, 10)}}
}

// prepareCached runs one action, which the ops then ask for again.
func prepareCached(ctx context.Context, c *client) (op, error) {
	a, err := c.oneResult(ctx)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, _ uint64) error {
		got, err := c.execute(ctx, a)
		if err == nil && !got.cached {
			return answerError("execute: the action was run again, want its cached result")
		}
		return err
	}, nil
}

// oneResult runs an action, so that its result is in the action cache.
func (c *client) oneResult(ctx context.Context) (digest.Digest, error) {
	if err := c.needExecution(); err != nil {
		return digest.Digest{}, err
	}
	root, err := c.message(&repb.Directory{})
	if err != nil {
		return digest.Digest{}, err
	}
	if err := c.upload(ctx, root); err != nil {
		return digest.Digest{}, err
	}
	cmd := trivialCommand(newSalt(), 0)
	if _, err := c.runAction(ctx, cmd, root.digest); err != nil {
		return digest.Digest{}, err
	}
	a, _, err := c.action(cmd, root.digest)
	return a.digest, err
}

// prepareActionCache has a result put into the cache: by running an action, or
// where the server does not execute, as a client that executes itself does.
func prepareActionCache(ctx context.Context, c *client) (op, error) {
	if err := c.needStorage(); err != nil {
		return nil, err
	}
	a, err := c.oneResult(ctx)
	if errors.Is(err, errSkip) {
		a, err = c.ownResult(ctx)
	}
	if err != nil {
		return nil, err
	}
	req := &repb.GetActionResultRequest{InstanceName: c.instance, DigestFunction: c.fn.Proto(), ActionDigest: a.Proto()}
	return func(ctx context.Context, _ uint64) error {
		if _, err := c.ac.GetActionResult(ctx, req); err != nil {
			return fmt.Errorf("GetActionResult: %w", err)
		}
		return nil
	}, nil
}

func (c *client) ownResult(ctx context.Context) (digest.Digest, error) {
	a, cmd, err := c.action(trivialCommand(newSalt(), 0), digest.Empty(c.fn))
	if err != nil {
		return digest.Digest{}, err
	}
	if err := c.upload(ctx, a, cmd); err != nil {
		return digest.Digest{}, err
	}
	_, err = c.ac.UpdateActionResult(ctx, &repb.UpdateActionResultRequest{
		InstanceName: c.instance, DigestFunction: c.fn.Proto(), ActionDigest: a.digest.Proto(),
		ActionResult: &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "mettle-bench"}},
	})
	if code := status.Code(err); code == codes.PermissionDenied || code == codes.Unimplemented {
		return digest.Digest{}, fmt.Errorf("%w: the server neither executes nor takes results: %w", errSkip, err)
	}
	return a.digest, err
}

const (
	inputFiles   = 50
	inputDirs    = 5
	inputSize    = 1024
	outputFiles  = 5
	action50Text = `for i in 1 2 3 4 5; do echo "$` + saltVariable + ` $i" > out/$i; done`
)

// prepareAction50 is for actions with 50 inputs of 1 KiB, the same for all, in
// five directories, and five outputs of their own.
func prepareAction50(ctx context.Context, c *client) (op, error) {
	if err := c.needExecution(); err != nil {
		return nil, err
	}
	root, err := c.inputRoot(ctx)
	if err != nil {
		return nil, err
	}
	var outputs []string
	for i := range outputFiles {
		outputs = append(outputs, "out/"+strconv.Itoa(i+1))
	}
	salt := newSalt()
	return func(ctx context.Context, n uint64) error {
		// Servers of version 2.1 and later read output_paths and ignore
		// output_files; earlier ones know output_files alone.
		got, err := c.runAction(ctx, &repb.Command{
			Arguments: []string{"/bin/sh", "-c", action50Text}, EnvironmentVariables: saltEnv(salt, n),
			OutputPaths: outputs, OutputFiles: outputs,
		}, root)
		if err == nil && got.outputFiles != outputFiles {
			return answerError("execute: %d output files, want %d", got.outputFiles, outputFiles)
		}
		return err
	}, nil
}

func (c *client) inputRoot(ctx context.Context) (digest.Digest, error) {
	files := c.newSeries(inputSize)
	var blobs []content
	root := &repb.Directory{}
	for d := range inputDirs {
		dir := &repb.Directory{}
		for f := range inputFiles / inputDirs {
			b := files.content(uint64(d*inputFiles + f))
			blobs = append(blobs, b)
			dir.Files = append(dir.Files, &repb.FileNode{Name: "file" + strconv.Itoa(f), Digest: b.digest.Proto()})
		}
		b, err := c.message(dir)
		if err != nil {
			return digest.Digest{}, err
		}
		blobs = append(blobs, b)
		root.Directories = append(root.Directories, &repb.DirectoryNode{Name: "dir" + strconv.Itoa(d), Digest: b.digest.Proto()})
	}
	b, err := c.message(root)
	if err != nil {
		return digest.Digest{}, err
	}
	return b.digest, c.upload(ctx, append(blobs, b)...)
}

// runAction uploads an Action that is unlike any other, and runs it.
func (c *client) runAction(ctx context.Context, cmd *repb.Command, root digest.Digest) (executed, error) {
	a, cm, err := c.action(cmd, root)
	if err != nil {
		return executed{}, err
	}
	if err := c.upload(ctx, a, cm); err != nil {
		return executed{}, err
	}
	return c.executeNew(ctx, a.digest)
}

// executeNew is execute for an Action that was never run.
func (c *client) executeNew(ctx context.Context, action digest.Digest) (executed, error) {
	got, err := c.execute(ctx, action)
	if err != nil {
		return executed{}, err
	}
	if got.cached {
		return executed{}, answerError("execute: a cached result of an action that is new")
	}
	if o := got.overhead(); o > 0 {
		c.overheads.add(o)
	}
	return got, nil
}

// action makes an Action of a Command, to which it adds the platform.
func (c *client) action(cmd *repb.Command, root digest.Digest) (a, cm content, err error) {
	cmd.Platform = c.platform
	cm, err = c.message(cmd)
	if err != nil {
		return a, cm, err
	}
	a, err = c.message(&repb.Action{CommandDigest: cm.digest.Proto(), InputRootDigest: root.Proto(), Platform: c.platform})
	return a, cm, err
}
