package relay

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/mettle-build/mettle/elan/wire"
)

// download passes on a call of one message that is answered by many.
func (r *Relay) download(ss grpc.ServerStream, m *method) error {
	req := &wire.Raw{}
	if err := ss.RecvMsg(req); err != nil {
		return err //nolint:wrapcheck // a status
	}
	defer req.Free()
	ctx, end := r.until(ss.Context(), req, m)
	defer end()
	out := r.outgoing(ctx)
	a := attempts{r: r, m: m}
	for {
		conn, err := a.conn(ctx)
		if err != nil {
			return drained(ctx, err)
		}
		p := passage{ss: ss}
		p.err = drained(ctx, r.downloadOnce(out, conn, req, &p, m))
		if !p.begun && a.elsewhere(ctx, p.err, p.trailer) {
			continue
		}
		if p.err == nil || p.begun || !a.again(ctx, p.err, p.answered()) {
			return p.finish()
		}
	}
}

// downloadOnce makes one attempt.
func (r *Relay) downloadOnce(ctx context.Context, conn *grpc.ClientConn, req *wire.Raw, p *passage, m *method) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cs, err := conn.NewStream(ctx, m.desc, m.full, r.codec)
	if err != nil {
		return err //nolint:wrapcheck // a status
	}
	once := req.Clone()
	defer once.Free()
	if err := cs.SendMsg(once); err == nil {
		_ = cs.CloseSend() // it never fails
	} else if !errors.Is(err, io.EOF) { // which the answer explains
		return err //nolint:wrapcheck // a status
	}
	return p.run(cs)
}

// passage takes the answer from the storage to the client.
type passage struct {
	ss              grpc.ServerStream
	begun           bool // something was passed on
	header, trailer metadata.MD
	err             error // how it ended
}

// run returns when the storage has ended the call, or the client is gone.
func (p *passage) run(cs grpc.ClientStream) error {
	msg := &wire.Raw{}
	defer msg.Free()
	for {
		err := cs.RecvMsg(msg)
		if err != nil {
			p.trailer = cs.Trailer()
			if !p.begun {
				p.header, _ = cs.Header() // what is wrong with it, err tells
			}
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err //nolint:wrapcheck // a status, to be passed on as it is
		}
		if !p.begun {
			p.begun = true
			if p.header, err = cs.Header(); err != nil { // it is here with the first message
				return err //nolint:wrapcheck // a status
			}
			if err := p.ss.SetHeader(passed(p.header)); err != nil {
				return err //nolint:wrapcheck // a status
			}
		}
		if err := p.ss.SendMsg(msg); err != nil {
			return err //nolint:wrapcheck // a status
		}
	}
}

// answered reports whether the storage itself has said how the call ends.
func (p *passage) answered() bool { return len(p.trailer) > 0 || len(p.header) > 0 }

// finish passes on how it ended.
func (p *passage) finish() error {
	if !p.begun {
		// It fails only where the client is gone.
		_ = p.ss.SetHeader(passed(p.header))
	}
	p.ss.SetTrailer(passed(p.trailer))
	return p.err
}
