package client

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// maxInstances bounds the instances that are remembered: more than one process
// has work for at once, some hundred bytes each.
const maxInstances = 4096

// Instances is a server as one store in which the blobs of each instance are in
// the digest.Space of its name: what elan/blob/instances wants, for who keeps
// blobs of several instances apart as the server does. Which name a space has is
// known from Of on; of other spaces nothing can be asked. It is safe for
// concurrent use and needs no closing.
type Instances struct {
	base *Client // of the unnamed instance, for what concerns none

	mu      sync.Mutex // guards what is below
	bySpace map[digest.Space]*list.Element
	clients list.List // of *instance, the one used last in front
}

var (
	_ blob.Store       = (*Instances)(nil)
	_ blob.BatchReader = (*Instances)(nil)
	_ blob.BatchWriter = (*Instances)(nil)
	_ blob.TreeReader  = (*Instances)(nil)
)

type instance struct {
	space  digest.Space
	client *Client
}

// NewInstances checks the options, whose Instance must be empty. It makes no call.
func NewInstances(o Options) (*Instances, error) {
	if o.Instance != "" {
		return nil, errors.New("client: NewInstances takes no Instance")
	}
	base, err := New(o)
	if err != nil {
		return nil, err
	}
	return &Instances{base: base, bySpace: make(map[digest.Space]*list.Element)}, nil
}

// Of is the instance of that name, by itself: its digests are in no space.
func (s *Instances) Of(name string) *Client {
	space := digest.SpaceOf(name)
	s.mu.Lock()
	defer s.mu.Unlock()
	if e, ok := s.bySpace[space]; ok {
		s.clients.MoveToFront(e)
		return e.Value.(*instance).client //nolint:forcetypeassert // all are
	}
	c := s.base.in(name)
	s.bySpace[space] = s.clients.PushFront(&instance{space: space, client: c})
	if s.clients.Len() > maxInstances {
		last := s.clients.Remove(s.clients.Back()).(*instance) //nolint:forcetypeassert // all are
		delete(s.bySpace, last.space)
	}
	return c
}

// in is the same server's instance of that name.
func (c *Client) in(name string) *Client {
	o := c.o
	o.Instance = name
	return &Client{o: o, actions: c.actions, streams: c.streams, wire: c.wire, codec: c.codec, capabilities: c.capabilities}
}

// named is the instance that d is of.
func (s *Instances) named(d digest.Digest) (*Client, error) {
	if d.IsEmpty() {
		return s.base, nil // it is in all, and in no space
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.bySpace[d.Space()]
	if !ok {
		return nil, fmt.Errorf("blob %s: nothing is known of its instance: %w", d, errors.ErrUnsupported)
	}
	s.clients.MoveToFront(e)
	return e.Value.(*instance).client, nil //nolint:forcetypeassert // all are
}

// FindMissing implements blob.Finder, by at least one call for each instance.
func (s *Instances) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	byInstance := map[*Client][]digest.Digest{}
	for _, d := range ds {
		c, err := s.named(d)
		if err != nil {
			return nil, err
		}
		byInstance[c] = append(byInstance[c], d.Plain())
	}
	absent := map[digest.Digest]bool{}
	for c, plain := range byInstance {
		missing, err := c.FindMissing(ctx, plain)
		if err != nil {
			return nil, err
		}
		for _, d := range missing {
			absent[d.In(digest.SpaceOf(c.o.Instance))] = true
		}
	}
	var missing []digest.Digest
	for _, d := range ds {
		if absent[d] {
			missing = append(missing, d)
			absent[d] = false // once is enough
		}
	}
	return missing, nil
}

// Open implements blob.Opener.
func (s *Instances) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	c, err := s.named(d)
	if err != nil {
		return nil, err
	}
	return c.Open(ctx, d.Plain(), offset)
}

// Create implements blob.Creator.
func (s *Instances) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	c, err := s.named(d)
	if err != nil {
		return nil, err
	}
	return c.Create(ctx, d.Plain())
}

// ReadBatch implements blob.BatchReader, by at least one call for each instance.
func (s *Instances) ReadBatch(ctx context.Context, ds []digest.Digest, take func(i int, data []byte, err error)) error {
	byInstance := map[*Client][]int{}
	for i, d := range ds {
		c, err := s.named(d)
		if err != nil {
			return err
		}
		byInstance[c] = append(byInstance[c], i)
	}
	for c, numbers := range byInstance {
		plain := make([]digest.Digest, len(numbers))
		for i, n := range numbers {
			plain[i] = ds[n].Plain()
		}
		err := c.ReadBatch(ctx, plain, func(i int, data []byte, err error) { take(numbers[i], data, err) })
		if err != nil {
			return err
		}
	}
	return nil
}

// ReadTree implements blob.TreeReader.
func (s *Instances) ReadTree(ctx context.Context, root digest.Digest, take func(data []byte) error) error {
	c, err := s.named(root)
	if err != nil {
		return err
	}
	return c.ReadTree(ctx, root.Plain(), take)
}

// WriteBatch implements blob.BatchWriter likewise.
func (s *Instances) WriteBatch(ctx context.Context, bs []blob.Bytes) error {
	byInstance := map[*Client][]blob.Bytes{}
	for _, b := range bs {
		c, err := s.named(b.Digest)
		if err != nil {
			return err
		}
		byInstance[c] = append(byInstance[c], blob.Bytes{Digest: b.Digest.Plain(), Data: b.Data})
	}
	for c, plain := range byInstance {
		if err := c.WriteBatch(ctx, plain); err != nil {
			return err
		}
	}
	return nil
}
