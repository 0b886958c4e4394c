//go:build linux

package image_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/image"
)

// counting is a registry that counts how often each blob is asked for.
func counting(t *testing.T, of served) (host string, count func(digest string) int) {
	t.Helper()
	var mu sync.Mutex
	calls := map[string]int{}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			mu.Lock()
			calls[filepath.Base(r.URL.Path)]++
			mu.Unlock()
		}
		of.Config.Handler.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://"), func(digest string) int {
		mu.Lock()
		defer mu.Unlock()
		return calls[digest]
	}
}

// Many want images that share a layer: each layer comes once.
func TestOpen_many(t *testing.T) {
	shared := pack(t, file("shared", strings.Repeat("s", 100_000)))
	reg := serve(t)
	host, count := counting(t, reg)
	var refs []string
	layers := map[string]bool{}
	for i := range 4 {
		img := imageOf(t, shared, pack(t, file("own", fmt.Sprint(i))))
		refs = append(refs, strings.Replace(reg.push(t, fmt.Sprint("image", i), img), reg.host, host, 1))
		all, err := img.Layers()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range all {
			layers[digestOf(t, l)] = true
		}
	}
	metrics := prometheus.NewRegistry()
	c := open(t, image.Options{Registries: []string{host}, Registerer: metrics})
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			r, err := c.Parse(refs[i%len(refs)])
			if err != nil {
				t.Error(err)
				return
			}
			img, err := c.Open(t.Context(), r)
			if err != nil {
				t.Error(err)
				return
			}
			defer img.Close()
			if got := read(t, img.Layers[1], "own"); got != fmt.Sprint(i%len(refs)) || len(read(t, img.Layers[0], "shared")) != 100_000 {
				t.Errorf("image %d has %q", i%len(refs), got)
			}
		})
	}
	wg.Wait()
	for digest := range layers {
		if n := count(digest); n != 1 {
			t.Errorf("layer %s was asked for %d times", digest, n)
		}
	}
	if n, err := testutil.GatherAndCount(metrics, "mettle_image_layers_total", "mettle_image_pulled_bytes_total", "mettle_image_cache_bytes"); err != nil || n != 5 {
		t.Errorf("%d metrics, %v", n, err)
	}
	problems, err := testutil.GatherAndLint(metrics)
	if err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
}

// What was pulled is there after a restart, without its source.
func TestNew_again(t *testing.T) {
	img := imageOf(t, pack(t, file("a", "a")), pack(t, file("b", "b")))
	path := asLayout(t, img)
	ref := local(t, path, img)
	dir := filepath.Join(t.TempDir(), "cache")
	start := func(t *testing.T) *image.Cache {
		t.Helper()
		c, err := image.New(image.Options{Dir: dir, LocalDirs: []string{filepath.Dir(path)}})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := start(t)
	mustGet(t, c, ref).Close()
	if _, err := image.New(image.Options{Dir: dir}); err == nil || !strings.Contains(err.Error(), "another worker") {
		t.Errorf("New beside it: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		spoil func(layer string) error
		there bool
	}{
		"as it was":       {func(string) error { return nil }, true},
		"half unpacked":   {func(l string) error { return os.Mkdir(l+"-x.part", 0o700) }, true},
		"copy of a layer": {func(l string) error { return os.CopyFS(l+"x", os.DirFS(l)) }, true},
		"after a crash of the machine, told by its end": {func(string) error {
			return os.WriteFile(filepath.Join(dir, "state"), []byte(`{"Boot": "another", "Clean": true}`), 0o600)
		}, true},
		"half evicted":         {func(l string) error { return os.Rename(l, l+".part") }, false},
		"info that is damaged": {func(l string) error { return os.WriteFile(filepath.Join(l, "info"), []byte("{"), 0o600) }, false},
		"no info":              {func(l string) error { return os.Remove(filepath.Join(l, "info")) }, false},
		"after a crash of the machine": {func(string) error {
			return os.WriteFile(filepath.Join(dir, "state"), []byte(`{"Boot": "another"}`), 0o600)
		}, false},
		"state that is damaged": {func(string) error { return os.WriteFile(filepath.Join(dir, "state"), nil, 0o600) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			saved := filepath.Join(t.TempDir(), "saved")
			if err := os.CopyFS(saved, os.DirFS(dir)); err != nil {
				t.Fatal(err)
			}
			layers, err := filepath.Glob(filepath.Join(dir, "layers", "*"))
			if err != nil || len(layers) == 0 {
				t.Fatalf("layers %q, %v", layers, err)
			}
			if err := tc.spoil(layers[0]); err != nil {
				t.Fatal(err)
			}
			c := start(t)
			_, err = get(t, c, ref)
			if tc.there != (err == nil) || err != nil && !errors.Is(err, image.ErrUnusable) {
				t.Errorf("Open: %v", err)
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "*", "*.part")); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
			// Another tries from the same.
			t.Cleanup(func() {
				err := errors.Join(c.Close(), os.RemoveAll(dir), os.CopyFS(dir, os.DirFS(saved)))
				if err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// bytesOf is what a layer takes that has one file of so many bytes.
func bytesOf(n int64) int64 { return (n+4095)/4096*4096 + 4096 }

func TestOpen_evicts(t *testing.T) {
	const size = 100_000
	var imgs []v1.Image
	for i := range 4 {
		imgs = append(imgs, imageOf(t, pack(t, file("a", strings.Repeat(fmt.Sprint(i), size)))))
	}
	path := asLayout(t, imgs...)
	o := image.Options{Dir: filepath.Join(t.TempDir(), "cache"), LocalDirs: []string{filepath.Dir(path)}, MaxBytes: 2 * bytesOf(size), MaxImageBytes: 2 * size}
	c := open(t, o)
	ref := func(i int) string { return local(t, path, imgs[i]) }
	there := func(i int) bool {
		images, _ := filepath.Glob(filepath.Join(o.Dir, "layers", "*", "tree", "a"))
		for _, f := range images {
			if data, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(data), fmt.Sprint(i)) {
				return true
			}
		}
		return false
	}
	first, second := mustGet(t, c, ref(0)), mustGet(t, c, ref(1))
	if _, err := get(t, c, ref(2)); !errors.Is(err, image.ErrFull) {
		t.Errorf("a third beside two in use: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(o.Dir, "layers", "*.part")); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	if !there(0) || !there(1) {
		t.Error("what is in use was evicted")
	}
	second.Close()
	first.Close()
	mustGet(t, c, ref(2)).Close()
	if !there(0) || there(1) || !there(2) {
		t.Error("evicted was another than the one that was let go first")
	}
	mustGet(t, c, ref(0)).Close()
	mustGet(t, c, ref(3)).Close()
	if !there(0) || there(2) || !there(3) {
		t.Error("evicted was another than the one that was used first")
	}
	if _, err := os.Stat(filepath.Join(first.Layers[0], "a")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// After a restart with less room, what was used last stays.
func TestNew_lessRoom(t *testing.T) {
	imgs := []v1.Image{imageOf(t, pack(t, file("a", "0"))), imageOf(t, pack(t, file("a", "1")))}
	path := asLayout(t, imgs...)
	o := image.Options{Dir: filepath.Join(t.TempDir(), "cache"), LocalDirs: []string{filepath.Dir(path)}}
	c, err := image.New(o)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{0, 1, 0} {
		mustGet(t, c, local(t, path, imgs[i])).Close()
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	o.MaxBytes = bytesOf(1)
	c = open(t, o)
	if _, err := get(t, c, local(t, path, imgs[1])); err == nil {
		t.Error("both are there")
	}
	mustGet(t, c, local(t, path, imgs[0]))
}

// pullerEnv has this program pull an image and do nothing else: the directory of
// the cache, and the reference.
const pullerEnv = "METTLE_TEST_PULL"

// smallEnv has it do so on a disk of a megabyte.
const smallEnv = "METTLE_TEST_SMALL"

// puller is the main of that.
func puller(text string) int {
	dir, ref, _ := strings.Cut(text, " ")
	if os.Getenv(smallEnv) != "" {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
			fmt.Println("mount:", err)
			return 1
		}
	}
	c, err := image.New(image.Options{Dir: dir, Registries: []string{"*"}, MaxBytes: 1 << 30})
	if err != nil {
		fmt.Println("new:", err)
		return 1
	}
	r, err := c.Parse(ref)
	if err == nil {
		_, err = c.Open(context.Background(), r)
	}
	parts, _ := filepath.Glob(filepath.Join(dir, "layers", "*"))
	fmt.Println(err, errors.Is(err, image.ErrUnusable), errors.Is(err, image.ErrUnavailable), parts)
	return 1
}

// Whoever pulls is killed in the middle of a layer.
func TestNew_afterKill(t *testing.T) {
	img := imageOf(t, pack(t, file("first", strings.Repeat("1", 1000)), file("second", random(t, 1<<20))))
	reg := serve(t)
	ref := reg.push(t, "a", img)
	all, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	layer := digestOf(t, all[0])
	half := make(chan struct{})
	slow := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, layer) {
			reg.Config.Handler.ServeHTTP(w, r)
			return
		}
		rec := httptest.NewRecorder()
		reg.Config.Handler.ServeHTTP(rec, r)
		w.Header().Set("Content-Length", fmt.Sprint(rec.Body.Len()))
		_, _ = w.Write(rec.Body.Bytes()[:rec.Body.Len()/2])
		_ = http.NewResponseController(w).Flush()
		close(half)
		<-r.Context().Done()
	}))
	defer slow.Close()
	dir := filepath.Join(t.TempDir(), "cache")
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), pullerEnv+"="+dir+" "+strings.Replace(ref, reg.host, strings.TrimPrefix(slow.URL, "http://"), 1))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-half
	waitFor(t, func() bool {
		parts, _ := filepath.Glob(filepath.Join(dir, "layers", "*.part", "tree", "first"))
		return len(parts) == 1
	})
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	c := open(t, image.Options{Dir: dir, Registries: []string{reg.host}})
	wantEmpty(t, filepath.Join(dir, "layers"))
	if got := mustGet(t, c, ref); len(read(t, got.Layers[0], "second")) != 1<<20 {
		t.Error("not all of it is there")
	}
}

// A full disk is neither the image's fault nor the registry's, and nothing is left on
// it.
func TestOpen_diskFull(t *testing.T) {
	reg := serve(t)
	ref := reg.push(t, "a", imageOf(t, pack(t, file("a", "a"), file("b", random(t, 4<<20)))))
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), smallEnv+"=1", pullerEnv+"="+t.TempDir()+" "+ref)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	data, err := cmd.Output()
	out := string(data)
	if len(data) == 0 || strings.HasPrefix(out, "mount:") || strings.HasPrefix(out, "new:") {
		t.Skipf("this machine lets nobody mount a small disk that holds images: %v, %s", err, out)
	}
	if !strings.Contains(out, "no space left on device false false []") {
		t.Errorf("Open: %s", out)
	}
}
