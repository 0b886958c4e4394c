package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	bspb "google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	mib = 1 << 20
	gib = 1 << 30
	// streamMessage is how streams are cut: the largest power of two below
	// gRPC's default limit of 4 MiB that most servers and clients use.
	streamMessage = mib
	// floorStream is the length of a stream of the floor: long enough that its
	// opening does not count, short enough that a sample of many clients ends
	// about when it should.
	floorStream = 16 * mib
)

// floorKind is one of the things that the machine itself is measured by.
type floorKind uint8

const (
	floorSpawn floorKind = iota
	floorUnary
	floorRead
	floorWrite
	floorNamespaces
	floorLink
)

func (k floorKind) String() string {
	return [...]string{"spawn", "unary", "read", "write", "namespaces", "link"}[k]
}

func (k floorKind) unit() string {
	return [...]string{"spawns/s", "calls/s", "GiB/s", "GiB/s", "spawns/s", "links/s"}[k]
}

// perOp is how many units one op of the floor has.
func (k floorKind) perOp() float64 {
	if k == floorRead || k == floorWrite {
		return float64(floorStream) / gib
	}
	return 1
}

func floorScenarios(o Options) []scenario {
	clients := append([]int{1}, o.Concurrency...)
	slices.Sort(clients)
	clients = slices.Compact(clients)
	var plan []scenario
	add := func(k floorKind, clients int) {
		plan = append(plan, scenario{name: k.String(), clients: clients, unit: k.unit(), perOp: k.perOp(), floor: k})
	}
	for _, k := range []floorKind{floorSpawn, floorNamespaces, floorUnary} {
		for _, c := range clients {
			add(k, c)
		}
	}
	add(floorLink, 1)
	add(floorRead, 1)
	add(floorWrite, 1)
	return plan
}

// floors measures the machine. It is safe for concurrent use.
type floors struct {
	dir    string
	null   *os.File
	conn   *grpc.ClientConn
	client bspb.ByteStreamClient
	server *grpc.Server
	served chan struct{}
}

// startFloors makes a directory and a bare gRPC server on loopback. The caller
// closes them.
func startFloors(ctx context.Context) (_ *floors, err error) {
	f := &floors{served: make(chan struct{})}
	f.dir, err = os.MkdirTemp("", "mettle-bench-")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(f.dir))
		}
	}()
	if err := os.WriteFile(filepath.Join(f.dir, linkSource), []byte("linked"), 0o600); err != nil {
		return nil, err
	}
	f.null, err = os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, errors.Join(err, f.null.Close())
	}
	f.conn, err = grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, errors.Join(err, f.null.Close(), l.Close())
	}
	f.client = bspb.NewByteStreamClient(f.conn)
	f.server = grpc.NewServer()
	bspb.RegisterByteStreamServer(f.server, &bareStreams{message: &bspb.ReadResponse{Data: make([]byte, streamMessage)}})
	go func() {
		defer close(f.served)
		_ = f.server.Serve(l) // ends with Stop; sooner, all calls fail and tell
	}()
	return f, nil
}

// close frees everything. What goes wrong then changes no figure.
func (f *floors) close() {
	_ = f.conn.Close()
	f.server.Stop()
	<-f.served
	_ = f.null.Close()
	_ = os.RemoveAll(f.dir)
}

func (f *floors) op(k floorKind) op {
	return [...]op{f.spawn, f.unary, f.read, f.write, f.namespaces, f.link}[k]
}

// spawn does mkdir, vfork, exec, wait and rmdir.
func (f *floors) spawn(_ context.Context, n uint64) error { return f.spawnWith(nil, n) }

// namespaces is spawn into new namespaces.
func (f *floors) namespaces(_ context.Context, n uint64) error {
	attr, err := namespaceAttr()
	if err != nil {
		return err
	}
	return f.spawnWith(attr, n)
}

// refuses tells why this machine has no floor of a kind.
func (f *floors) refuses(ctx context.Context, k floorKind) error {
	if k != floorNamespaces {
		return nil
	}
	if err := f.namespaces(ctx, 0); err != nil {
		return fmt.Errorf("%w: this machine has no floor %s: %w", errSkip, k, err)
	}
	return nil
}

func (f *floors) spawnWith(attr *syscall.SysProcAttr, n uint64) error {
	dir := filepath.Join(f.dir, strconv.FormatUint(n, 10))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	fd := f.null.Fd()
	pid, err := syscall.ForkExec("/bin/true", []string{"/bin/true"}, &syscall.ProcAttr{
		Dir: dir, Env: []string{}, Files: []uintptr{fd, fd, fd}, Sys: attr,
	})
	if err != nil {
		return errors.Join(fmt.Errorf("spawn /bin/true: %w", err), os.Remove(dir))
	}
	var status syscall.WaitStatus
	for {
		_, err = syscall.Wait4(pid, &status, 0, nil)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil || status.ExitStatus() != 0 {
		return fmt.Errorf("wait for /bin/true: %w, status %#x", err, int(status))
	}
	return syscall.Rmdir(dir)
}

// linkSource is the file that floor link links, in its directory.
const linkSource = "source"

// link does link and unlink.
func (f *floors) link(_ context.Context, n uint64) error {
	to := filepath.Join(f.dir, strconv.FormatUint(n, 10))
	if err := os.Link(filepath.Join(f.dir, linkSource), to); err != nil {
		return err
	}
	return os.Remove(to)
}

func (f *floors) unary(ctx context.Context, _ uint64) error {
	_, err := f.client.QueryWriteStatus(ctx, &bspb.QueryWriteStatusRequest{ResourceName: "floor"})
	return err
}

func (f *floors) read(ctx context.Context, _ uint64) error {
	s, err := f.client.Read(ctx, &bspb.ReadRequest{ResourceName: "floor", ReadLimit: floorStream})
	if err != nil {
		return err
	}
	n, err := drain(s)
	if err == nil && n != floorStream {
		err = answerError("%d bytes, want %d", n, floorStream)
	}
	return err
}

func (f *floors) write(ctx context.Context, _ uint64) error {
	s, err := f.client.Write(ctx)
	if err != nil {
		return err
	}
	m := &bspb.WriteRequest{Data: make([]byte, streamMessage)}
	for m.WriteOffset = 0; m.WriteOffset < floorStream; m.WriteOffset += streamMessage {
		if err := s.Send(m); err != nil {
			break // CloseAndRecv tells why
		}
	}
	_, err = s.CloseAndRecv()
	return err
}

// drain reads a stream to its end, and returns how many bytes there were.
func drain(s bspb.ByteStream_ReadClient) (int64, error) {
	var n int64
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		n += int64(len(m.GetData()))
	}
}

// bareStreams is the server of the floor: it stores nothing and checks nothing.
type bareStreams struct {
	bspb.UnimplementedByteStreamServer
	message *bspb.ReadResponse
}

func (b *bareStreams) QueryWriteStatus(context.Context, *bspb.QueryWriteStatusRequest) (*bspb.QueryWriteStatusResponse, error) {
	return &bspb.QueryWriteStatusResponse{}, nil
}

func (b *bareStreams) Read(r *bspb.ReadRequest, s bspb.ByteStream_ReadServer) error {
	for left := r.GetReadLimit(); left > 0; left -= int64(len(b.message.GetData())) {
		if err := s.Send(b.message); err != nil {
			return err
		}
	}
	return nil
}

func (b *bareStreams) Write(s bspb.ByteStream_WriteServer) error {
	for {
		_, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return s.SendAndClose(&bspb.WriteResponse{})
		}
		if err != nil {
			return err
		}
	}
}
