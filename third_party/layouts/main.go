// Command layouts measures ways to keep many small blobs on one disk: a file for
// each, packs (both are elan/blob/file), and the Pebble database. The figures in
// elan/blob/file/README.md are its. It is a module of its own, so that the
// product does not depend on Pebble.
//
//	go run . -layout packs -dir /mnt/disk/packs -blobs 10000000 -size 1024
//
// The directory is to be new, on a file system that nobody else uses meanwhile.
package main

import (
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/digest"
)

// layout is one way to keep blobs.
type layout interface {
	put(ctx context.Context, d digest.Digest, data []byte) error
	get(ctx context.Context, d digest.Digest, data []byte) error
	missing(ctx context.Context, ds []digest.Digest) (int, error)
	close() error
}

// flags are those of the command line.
type flags struct {
	layout, dir, phase   string
	blobs, size, workers int
	maxPacked            int64
	reads, asked, rounds int
}

func main() {
	var f flags
	flag.StringVar(&f.layout, "layout", "packs", "files, packs or pebble")
	flag.StringVar(&f.dir, "dir", "", "the directory, which is made")
	flag.StringVar(&f.phase, "phase", "", "write or read; both, each in its own process, where it is not given")
	flag.IntVar(&f.blobs, "blobs", 1_000_000, "how many blobs")
	flag.IntVar(&f.size, "size", 1024, "bytes of each")
	flag.Int64Var(&f.maxPacked, "max_packed", 0, "bytes of the largest blob that is packed; 0: as the store sees fit")
	flag.IntVar(&f.workers, "workers", 2, "goroutines that write and read")
	flag.IntVar(&f.reads, "reads", 400_000, "how many blobs are read, at random")
	flag.IntVar(&f.asked, "asked", 20_000, "how many digests FindMissing is asked for")
	flag.IntVar(&f.rounds, "rounds", 25, "how often")
	flag.Parse()
	if err := run(context.Background(), f); err != nil {
		slog.Error("measuring", "error", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, f flags) error {
	if f.dir == "" || f.size < 8 {
		return fmt.Errorf("-dir is needed, and a -size of at least 8")
	}
	switch f.phase {
	case "write":
		return write(ctx, f)
	case "read":
		return read(ctx, f)
	}
	for _, phase := range []string{"write", "read"} {
		cmd := exec.CommandContext(ctx, os.Args[0], append(os.Args[1:], "-phase", phase)...)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s: %w", phase, err)
		}
	}
	return nil
}

func open(f flags) (layout, error) {
	switch f.layout {
	case "files":
		return openFile(f.dir, -1)
	case "packs":
		return openFile(f.dir, f.maxPacked)
	case "pebble":
		return openPebble(f.dir)
	}
	return nil, fmt.Errorf("there is no layout %q", f.layout)
}

// content is the n-th blob: bytes that do not compress.
func content(n, size int) []byte {
	data := make([]byte, size)
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], uint64(n))
	_, _ = rand.NewChaCha8(seed).Read(data) // it never fails
	return data
}

// each calls do with 0 to n-1, by so many workers.
func each(n, workers int, do func(i int) error) error {
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make(chan error, workers)
	for range workers {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				if err := do(int(i)); err != nil {
					errs <- err
					next.Store(int64(n))
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	return <-errs
}

func write(ctx context.Context, f flags) error {
	before, err := used(f.dir)
	if err != nil {
		return err
	}
	l, err := open(f)
	if err != nil {
		return err
	}
	begun, cpu := time.Now(), cpuTime()
	last := begun
	err = each(f.blobs, f.workers, func(i int) error {
		if i > 0 && i%1_000_000 == 0 {
			slog.Info("written", "layout", f.layout, "blobs", i, "last_million", time.Since(last))
			last = time.Now()
		}
		data := content(i, f.size)
		return l.put(ctx, digest.Of(digest.SHA256, data), data)
	})
	if err != nil {
		return err
	}
	took := time.Since(begun)
	cpu = cpuTime() - cpu
	rss := memory()
	if err := l.close(); err != nil {
		return err
	}
	closed := time.Since(begun)
	after, err := used(f.dir)
	if err != nil {
		return err
	}
	n := float64(f.blobs)
	fmt.Printf("%s: %d blobs of %d bytes\n", f.layout, f.blobs, f.size)
	fmt.Printf("  written        %.0f/s, %.1f us of CPU each; %.0f/s until all is on the disk\n",
		n/took.Seconds(), cpu.Seconds()*1e6/n, n/closed.Seconds())
	fmt.Printf("  disk           %.0f bytes each, and %.0f of inodes\n", float64(after.bytes-before.bytes)/n, float64(after.inodes-before.inodes)*256/n)
	fmt.Printf("  memory         %s at the end of writing\n", rss)
	return nil
}

func read(ctx context.Context, f flags) error {
	begun := time.Now()
	l, err := open(f)
	if err != nil {
		return err
	}
	fmt.Printf("  start          %v, memory %s\n", time.Since(begun).Round(10*time.Microsecond), memory())
	present := digests(f, func(int) int { return rand.IntN(f.blobs) })
	absent := digests(f, func(i int) int { return f.blobs + i })
	for i, ds := range [][][]digest.Digest{present, absent} {
		name := []string{"present", "absent"}[i]
		var took []time.Duration
		for _, ask := range ds {
			begun := time.Now()
			missing, err := l.missing(ctx, ask)
			if err != nil {
				return err
			}
			if want := i * len(ask); missing != want {
				return fmt.Errorf("find %s: %d missing, want %d", name, missing, want)
			}
			took = append(took, time.Since(begun))
		}
		first := took[0]
		slices.Sort(took)
		fmt.Printf("  find %-8s  %d in %v (median; the first %v)\n", name, f.asked, took[len(took)/2].Round(10*time.Microsecond), first.Round(10*time.Microsecond))
	}
	begun, cpu := time.Now(), cpuTime()
	err = each(f.reads, f.workers, func(int) error {
		want := content(rand.IntN(f.blobs), f.size)
		data := make([]byte, f.size)
		d := digest.Of(digest.SHA256, want)
		if err := l.get(ctx, d, data); err != nil {
			return err
		}
		if string(data) != string(want) {
			return fmt.Errorf("blob %s has other bytes", d)
		}
		return nil
	})
	if err != nil {
		return err
	}
	took := time.Since(begun)
	fmt.Printf("  read           %.0f/s, %.1f us of CPU each\n", float64(f.reads)/took.Seconds(), (cpuTime()-cpu).Seconds()*1e6/float64(f.reads))
	fmt.Printf("  memory         %s after that\n", memory())
	return l.close()
}

// digests are what is asked for in each round; number says which the i-th is.
func digests(f flags, number func(i int) int) [][]digest.Digest {
	all := make([][]digest.Digest, f.rounds)
	for r := range all {
		all[r] = make([]digest.Digest, f.asked)
		for i := range all[r] {
			all[r][i] = digest.Of(digest.SHA256, content(number(r*f.asked+i), f.size))
		}
	}
	return all
}

// usage is of a file system.
type usage struct{ bytes, inodes int64 }

// used is that of the one on which dir is, or will be.
func used(dir string) (usage, error) {
	var st unix.Statfs_t
	unix.Sync()
	if err := unix.Statfs(dir, &st); err != nil {
		if err := unix.Statfs(filepath.Dir(dir), &st); err != nil {
			return usage{}, err
		}
	}
	return usage{bytes: int64(st.Blocks-st.Bfree) * st.Bsize, inodes: int64(st.Files - st.Ffree)}, nil
}

func cpuTime() time.Duration {
	var r unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &r) != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// memory is what the kernel says of this process: its own, and mapped files,
// which the kernel can take back.
func memory() string {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err.Error()
	}
	var own, mapped int
	for line := range strings.Lines(string(data)) {
		_, _ = fmt.Sscanf(line, "RssAnon: %d", &own)
		_, _ = fmt.Sscanf(line, "RssFile: %d", &mapped)
	}
	return fmt.Sprintf("%d MiB, and %d MiB of mapped files", own>>10, mapped>>10)
}
