package gate_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/elan/gate"
)

// Where memory is short, the client with the most calls that wait loses them, the
// youngest first, and may begin no more; another one is served.
func TestGate_memoryIsShort(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var begun atomic.Int64
	all := make(chan struct{}, 1)
	const greedyCalls = 100
	var heap atomic.Int64
	looked := make(chan struct{}) // for who waits for a look
	s := serve(t, gate.Options{MaxMemoryBytes: 1 << 40}, handlers{
		unary: func(context.Context) error { return nil },
		stream: func(ss grpc.ServerStream) error {
			if begun.Add(1) == greedyCalls+1 {
				all <- struct{}{}
			}
			return echo(ss)
		},
	}, l, func() int64 {
		select {
		case looked <- struct{}{}:
		default:
		}
		return heap.Load()
	})
	good, greedy := s.connect(t, l.Addr().String(), "127.0.0.2"), s.connect(t, l.Addr().String(), "127.0.0.3")
	kept := open(t, good)
	ended := make(chan int, greedyCalls)
	streams := make([]grpc.ClientStream, greedyCalls)
	for i := range streams {
		streams[i] = open(t, greedy)
		go func() {
			if err := streams[i].RecvMsg(&message{}); err != nil {
				wantCode(t, "a call that was ended", err, codes.Internal)
				ended <- i
				return
			}
			ended <- -1
		}()
	}
	<-all
	heap.Store(1 << 40 / 100 * 80)
	for range greedyCalls - 4 { // so few are left to each client
		if i := <-ended; i < 4 {
			t.Errorf("call %d was ended, which is among the oldest", i)
		}
	}
	if err := good.Invoke(t.Context(), unaryMethod, &message{}, &message{}); err != nil {
		t.Errorf("a call of the other client: %v", err)
	}
	// Still short, and not so much that calls are ended. The second look shows that
	// the first is over.
	heap.Store(1 << 40 / 100 * 70)
	<-looked
	<-looked
	// More than its share of calls are turned away.
	more := make([]grpc.ClientStream, gate.MinShare)
	refused := 0
	for i := range more {
		more[i] = open(t, greedy)
		_ = more[i].SendMsg(&message{}) // what is wrong, RecvMsg tells
		if err := more[i].RecvMsg(&message{}); err != nil {
			wantLater(t, "a call that was turned away", err)
			refused++
		}
	}
	if refused < 4 {
		t.Errorf("%d calls were turned away, want those that are more than %d", refused, gate.MinShare)
	}
	heap.Store(1 << 40 / 100 * 10)
	// The look that finds it eased.
	for err = greedy.Invoke(t.Context(), unaryMethod, &message{}, &message{}); err != nil; {
		time.Sleep(gate.WeighEvery)
		err = greedy.Invoke(t.Context(), unaryMethod, &message{}, &message{})
	}
	for _, cs := range append(streams[:4:4], kept) {
		if err := cs.SendMsg(&message{}); err != nil {
			t.Errorf("a call that was not ended: %v", err)
		}
		if cs == kept {
			if err := cs.RecvMsg(&message{}); err != nil {
				t.Errorf("a call of the other client: %v", err)
			}
		}
	}
	for range 4 {
		if i := <-ended; i != -1 {
			t.Errorf("call %d was ended", i)
		}
	}
}

// The garbage is collected where that may show that memory is short, and not again and
// again where much is in use for good.
func TestWeigh(t *testing.T) {
	// So much that what other tests leave, which goes little by little, is next to nothing.
	kept := make([]byte, 256<<20)
	for range 3 {
		runtime.GC()
	}
	live, _ := gate.Weigh(1<<40, 1)
	if live < int64(len(kept)) {
		t.Fatalf("%d bytes are alive, want %d at least", live, len(kept))
	}
	for _, tc := range []struct {
		name  string
		part  int64 // of the limit that is alive, in percent
		fresh int
	}{
		{"next to nothing", 10, 0},
		{"more than where it is eased", 65, 0},
		{"too much", 85, 5},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, fresh := gate.Weigh(live/tc.part*100, 5); fresh != tc.fresh {
				t.Errorf("collected %d times, want %d", fresh, tc.fresh)
			}
		})
	}
	runtime.KeepAlive(kept)
}

func TestNew_memoryLimit(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(300 << 20))
	g, err := gate.New(gate.Options{Prefix: "elan"})
	if err != nil {
		t.Fatal(err)
	}
	if got := g.Limit(); got != 300<<20 {
		t.Errorf("%d bytes, want what GOMEMLIMIT gives", got)
	}
}

func TestMachineMemory(t *testing.T) {
	const gib = 1 << 30
	for _, tc := range []struct {
		name  string
		files map[string]string
		want  int64
	}{
		{"the machine's", map[string]string{"proc/meminfo": "MemTotal:       4194304 kB\nMemFree: 1 kB\n"}, 4 * gib},
		{"nothing is known", nil, 8 * gib},
		{"a control group", map[string]string{
			"proc/meminfo": "MemTotal: 4194304 kB\n", "proc/self/cgroup": "0::/a/b\n",
			"sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/memory.max": "2147483648\n",
		}, 2 * gib},
		{"a container's, whose path is not here", map[string]string{
			"proc/meminfo": "MemTotal: 4194304 kB\n", "proc/self/cgroup": "0::/outside/c\n", "sys/fs/cgroup/memory.max": "1073741824\n",
		}, gib},
		{"a control group of version 1", map[string]string{
			"proc/meminfo": "MemTotal: 4194304 kB\n", "proc/self/cgroup": "5:memory:/x\n3:cpu:/\n",
			"sys/fs/cgroup/memory/x/memory.limit_in_bytes": "1073741824\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
		}, gib},
		{"too little", map[string]string{"proc/meminfo": "MemTotal: 1024 kB\n"}, gib / 4},
		{"nonsense", map[string]string{"proc/meminfo": "MemTotal: -3 kB\n", "proc/self/cgroup": "x\n:::\n0::/\n", "sys/fs/cgroup/memory.max": "99999999999999999999\n"}, 8 * gib},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := t.TempDir()
			for name, text := range tc.files {
				path := filepath.Join(root, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if got := gate.MachineMemory(root); got != tc.want {
				t.Errorf("%d bytes, want %d", got, tc.want)
			}
		})
	}
}
