package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// maxTreeCalls bounds the calls of one ReadTree: a server that ends each after
	// a page, which the REAPI allows, has a thousand Directories on a page at least.
	maxTreeCalls = 1000
	// The fields of a GetTreeResponse.
	treeDirectories, treeNextToken = 1, 2
)

var _ blob.TreeReader = (*Client)(nil)

// ReadTree implements blob.TreeReader, by GetTree. Where the server has none, or its
// messages are too large, the error is errors.ErrUnsupported.
func (c *Client) ReadTree(ctx context.Context, root digest.Digest, take func(data []byte) error) error {
	if err := checkDigest(root); err != nil {
		return fmt.Errorf("read tree: %w", err)
	}
	if c.noTrees.Load() {
		return errors.ErrUnsupported
	}
	req := &repb.GetTreeRequest{InstanceName: c.o.Instance, RootDigest: root.Proto(), DigestFunction: root.Function().Proto()}
	for range maxTreeCalls {
		token, err := c.readTree(ctx, req, take)
		if err != nil || token == "" || token == req.PageToken {
			return err
		}
		req.PageToken = token
	}
	return nil
}

// readTree makes one call, and returns the token of the last page.
func (c *Client) readTree(ctx context.Context, req *repb.GetTreeRequest, take func(data []byte) error) (token string, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the stream also where it is not read to its end
	stream, err := c.o.Conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, repb.ContentAddressableStorage_GetTree_FullMethodName, c.wire)
	if err == nil {
		err = stream.SendMsg(req)
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = stream.CloseSend()
	}
	for err == nil {
		// The Directories are wanted as they are, and not decoded and encoded anew: to
		// a message without fields they are bytes that it keeps.
		page := &emptypb.Empty{}
		if err = stream.RecvMsg(page); err != nil {
			break
		}
		if token, err = readPage(page.ProtoReflect().GetUnknown(), take); err != nil {
			return "", err
		}
	}
	switch status.Code(err) {
	case codes.Unimplemented:
		c.noTrees.Store(true)
		return "", errors.ErrUnsupported
	case codes.ResourceExhausted, codes.InvalidArgument:
		if askedToWait(status.Convert(err)) == nil {
			return "", errors.ErrUnsupported
		}
	}
	if errors.Is(err, io.EOF) {
		return token, nil
	}
	return "", fmt.Errorf("read tree: %w", fromStatus(err))
}

// readPage takes the Directories out of an encoded GetTreeResponse.
func readPage(page []byte, take func(data []byte) error) (token string, err error) {
	for len(page) > 0 {
		field, kind, n := protowire.ConsumeTag(page)
		if n < 0 {
			return "", fmt.Errorf("read tree: the server's answer: %w", protowire.ParseError(n))
		}
		page = page[n:]
		if kind != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(field, kind, page); n < 0 {
				return "", fmt.Errorf("read tree: the server's answer: %w", protowire.ParseError(n))
			}
			page = page[n:]
			continue
		}
		data, n := protowire.ConsumeBytes(page)
		if n < 0 {
			return "", fmt.Errorf("read tree: the server's answer: %w", protowire.ParseError(n))
		}
		page = page[n:]
		switch field {
		case treeDirectories:
			err = take(slices.Clip(data))
		case treeNextToken:
			token = string(data)
		}
		if err != nil {
			return "", err
		}
	}
	return token, nil
}
