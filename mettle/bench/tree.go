package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/digest"
)

// The tree of the subject gettree: a root with folders of folders, each of these
// with one file, so that no two are alike.
const (
	treeFolders = 99
	treeLeaves  = 100 // of a folder
	treeSize    = 1 + treeFolders*(1+treeLeaves)
	// dirsField is that of the Directories in a GetTreeResponse.
	dirsField = 1
)

func treeScenarios(Options) []scenario {
	return []scenario{{
		name: strconv.Itoa(treeSize) + " directories", clients: 1, unit: "dirs/s", perOp: treeSize,
		floor: floorUnary, floorPerOp: 1, prepare: prepareTree,
	}}
}

func prepareTree(ctx context.Context, c *client) (op, error) {
	if err := c.needStorage(); err != nil {
		return nil, err
	}
	root, err := c.uploadTree(ctx)
	if err != nil {
		return nil, err
	}
	req, err := c.encoded(&repb.GetTreeRequest{InstanceName: c.instance, RootDigest: root.Proto(), DigestFunction: c.fn.Proto()})
	if err != nil {
		return nil, err
	}
	walk := func(ctx context.Context, _ uint64) error { return c.getTree(ctx, req) }
	err = walk(ctx, 0)
	if status.Code(err) == codes.Unimplemented {
		return nil, fmt.Errorf("%w: the server has no GetTree", errSkip)
	}
	return walk, err
}

// getTree counts the Directories of all messages.
func (c *client) getTree(ctx context.Context, req rawMessage) error {
	s, err := c.open(ctx, getTree)
	if err != nil {
		return fmt.Errorf("GetTree: %w", err)
	}
	if err := s.SendMsg(req); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("GetTree: %w", err)
	}
	if err := s.CloseSend(); err != nil {
		return fmt.Errorf("GetTree: %w", err)
	}
	dirs := fieldCounter{field: dirsField}
	for {
		err := s.RecvMsg(&dirs)
		switch {
		case errors.Is(err, io.EOF) && dirs.n != treeSize:
			return answerError("GetTree: %d directories, want %d", dirs.n, treeSize)
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("GetTree: %w", err)
		}
	}
}

// uploadTree uploads the Directories, and not the files.
func (c *client) uploadTree(ctx context.Context) (digest.Digest, error) {
	files := c.newSeries(64)
	var blobs []content
	add := func(d *repb.Directory) (*repb.Digest, error) {
		b, err := c.message(d)
		blobs = append(blobs, b)
		return b.digest.Proto(), err
	}
	root := &repb.Directory{}
	for i := range treeFolders {
		folder := &repb.Directory{}
		for j := range treeLeaves {
			f, _ := files.blob(uint64(i*treeLeaves + j)) //nolint:gosec // not negative
			d, err := add(&repb.Directory{Files: []*repb.FileNode{{Name: "file", Digest: f.Proto()}}})
			if err != nil {
				return digest.Digest{}, err
			}
			folder.Directories = append(folder.Directories, &repb.DirectoryNode{Name: fmt.Sprintf("leaf%03d", j), Digest: d})
		}
		d, err := add(folder)
		if err != nil {
			return digest.Digest{}, err
		}
		root.Directories = append(root.Directories, &repb.DirectoryNode{Name: fmt.Sprintf("folder%02d", i), Digest: d})
	}
	if _, err := add(root); err != nil {
		return digest.Digest{}, err
	}
	return blobs[len(blobs)-1].digest, c.upload(ctx, blobs...)
}
