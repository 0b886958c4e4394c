package bench

import (
	"context"
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/digest"
)

// The input root of the subject tree10k: directories of as many files of 1 KiB,
// no two alike.
const (
	manyFiles   = 10_000
	manyDirs    = 100
	filesOfEach = manyFiles / manyDirs
	// maxNewTrees bounds what a server has to store: 10 MiB for each.
	maxNewTrees = 48
)

// many10k is an input root of many files, as it is for one action after the other.
type many10k struct {
	c       *client
	files   *series
	numbers [manyDirs][filesOfEach]uint64 // of the files, in the series
	next    uint64
	salt    string
	action  digest.Digest // the next to run
}

func tree10kScenarios(Options) []scenario {
	plan := func(name string, maxOps uint64, change func(*many10k) []uint64) scenario {
		return scenario{
			name: "10000 inputs, " + name, clients: 1, unit: "files/s", perOp: manyFiles,
			floor: floorLink, floorPerOp: manyFiles, maxOps: maxOps,
			prepareEach: func(ctx context.Context, c *client) (op, op, error) { return prepareMany(ctx, c, change) },
		}
	}
	return []scenario{
		plan("the same again", 0, func(*many10k) []uint64 { return nil }),
		plan("100 changed", 0, (*many10k).changeSome),
		plan("all new", maxNewTrees, (*many10k).changeAll),
	}
}

// prepareMany is for actions that run /bin/true in that input root. One op is an
// Execute to its end: all that it needs was uploaded before, which does not count.
func prepareMany(ctx context.Context, c *client, change func(*many10k) []uint64) (before, do op, err error) {
	if err := c.needExecution(); err != nil {
		return nil, nil, err
	}
	m := &many10k{c: c, files: c.newSeries(inputSize), salt: newSalt()}
	if err := m.upload(ctx, m.changeAll(), 0); err != nil {
		return nil, nil, err
	}
	before = func(ctx context.Context, n uint64) error { return m.upload(ctx, change(m), n) }
	do = func(ctx context.Context, _ uint64) error {
		_, err := c.executeNew(ctx, m.action)
		return err
	}
	return before, do, do(ctx, 0)
}

// changeAll makes every file another, and returns their numbers.
func (m *many10k) changeAll() []uint64 {
	var changed []uint64
	for d := range m.numbers {
		for f := range m.numbers[d] {
			m.next++
			m.numbers[d][f] = m.next
			changed = append(changed, m.next)
		}
	}
	return changed
}

// changeSome makes one file in a hundred another: one in every directory, so that
// none of these is as it was. It returns their numbers.
func (m *many10k) changeSome() []uint64 {
	var changed []uint64
	for d := range m.numbers {
		m.next++
		m.numbers[d][d%filesOfEach] = m.next
		changed = append(changed, m.next)
	}
	return changed
}

// upload puts the input root into the server, and an Action that has it and is
// unlike any other. Of the files, those that have changed are uploaded.
func (m *many10k) upload(ctx context.Context, changed []uint64, n uint64) error {
	var blobs []content
	for _, i := range changed {
		blobs = append(blobs, m.files.content(i))
	}
	root := &repb.Directory{}
	for d := range m.numbers {
		dir := &repb.Directory{}
		for f, number := range m.numbers[d] {
			file, _ := m.files.blob(number)
			dir.Files = append(dir.Files, &repb.FileNode{Name: fmt.Sprintf("file%02d", f), Digest: file.Proto()})
		}
		b, err := m.c.message(dir)
		if err != nil {
			return err
		}
		if len(changed) > 0 {
			blobs = append(blobs, b)
		}
		root.Directories = append(root.Directories, &repb.DirectoryNode{Name: fmt.Sprintf("dir%02d", d), Digest: b.digest.Proto()})
	}
	top, err := m.c.message(root)
	if err != nil {
		return err
	}
	a, cmd, err := m.c.action(trivialCommand(m.salt, n), top.digest)
	if err != nil {
		return err
	}
	m.action = a.digest
	return m.c.upload(ctx, append(blobs, top, a, cmd)...)
}
