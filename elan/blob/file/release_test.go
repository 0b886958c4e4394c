package file_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
)

//nolint:gochecknoglobals // a flag
var record = flag.String("record", "", "record a store that today's program made as that of this release")

// releaseDir has stores that programs of each release made, as a tar each, with
// the contents that it has to tell of: closed ones, and killed ones. They never
// change. Of version1 is the program that was the last to write that format
// (cf8ed53, before 0.1.0).
const releaseDir = "testdata/releases"

// kept is what a recorded store has to tell of.
type kept struct {
	Blobs   []keptBlob
	Entries []keptEntry
}

type keptBlob struct{ Digest, Space string }

func (b keptBlob) digest(t *testing.T) digest.Digest {
	t.Helper()
	d, err := digest.Parse(b.Digest)
	must(t, err)
	if b.Space == "" {
		return d
	}
	s, err := digest.ParseSpace(b.Space)
	must(t, err)
	return d.In(s)
}

type keptEntry struct {
	Instance, Action string
	Value            []byte
}

func (e keptEntry) key(t *testing.T) blob.EntryKey {
	t.Helper()
	d, err := digest.Parse(e.Action)
	must(t, err)
	return blob.EntryKey{Instance: e.Instance, Action: d}
}

// recordedOptions are those of a store that is recorded: a small one, whose
// segments are small.
func recordedOptions(dir string) file.Options {
	return packing(file.Options{Dir: dir, MaxBytes: 16 << 20, MinFreeBytes: -1})
}

// TestRecord records a release, if it is told to.
func TestRecord(t *testing.T) {
	if *record == "" {
		t.Skip("-record names no release")
	}
	must(t, os.MkdirAll(releaseDir, 0o755)) //nolint:gosec // part of the source
	dir := t.TempDir()
	s := openQuiet(t, recordedOptions(dir))
	k := fillToKeep(t, s)
	must(t, s.Sync())
	pack(t, dir, *record+"-killed", k)
	must(t, s.Close())
	pack(t, dir, *record, k)
}

// fillToKeep puts in blobs and entries in each of the ways in which they are kept.
func fillToKeep(t *testing.T, s *file.Store) (k kept) {
	t.Helper()
	links := t.TempDir()
	for i, size := range []int{0, 1, 100, 5_000, 16 << 10, 16<<10 + 1, 100_000} {
		data := bytes.Repeat([]byte("what a release has kept, "), size/25+1)[:size]
		for _, fn := range digest.Functions() {
			d := digest.Of(fn, data)
			must(t, blob.ReceiveBytes(t.Context(), s, d, data))
			k.Blobs = append(k.Blobs, keptBlob{Digest: d.String()})
			if fn == digest.BLAKE3 && size > 0 {
				spaced := d.In(digest.SpaceOf("instance"))
				must(t, blob.ReceiveBytes(t.Context(), s, spaced, data))
				k.Blobs = append(k.Blobs, keptBlob{d.String(), spaced.Space().String()})
			}
			if fn == digest.SHA1 { // files of the small ones, too
				must(t, s.Link(t.Context(), d, filepath.Join(links, fmt.Sprint(i)), blob.LinkExecutable))
			}
			if fn != digest.SHA256 && size != 100 {
				continue
			}
			for _, instance := range []string{"", "an/instance", strings.Repeat("long ", 100)} {
				e := keptEntry{instance, d.String(), data}
				must(t, s.PutEntry(t.Context(), e.key(t), []byte("replaced")))
				must(t, s.PutEntry(t.Context(), e.key(t), e.Value))
				k.Entries = append(k.Entries, e)
			}
		}
	}
	return k
}

// pack makes the tar of a store: its files with their modes and times, and the folders
// that have some.
func pack(t *testing.T, dir, name string, k kept) {
	t.Helper()
	path := filepath.Join(releaseDir, name+".tar.gz")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644) //nolint:gosec // part of the source
	if err != nil {
		t.Fatalf("%v: what a release kept does not change; record the next one", err)
	}
	defer f.Close()
	z, err := gzip.NewWriterLevel(f, gzip.BestCompression)
	must(t, err)
	w := tar.NewWriter(z)
	text, err := json.Marshal(k)
	must(t, err)
	must(t, w.WriteHeader(&tar.Header{Name: "kept.json", Mode: 0o644, Size: int64(len(text))}))
	_, err = w.Write(text)
	must(t, err)
	must(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		var st unix.Stat_t
		data, err := os.ReadFile(path)
		if err = errors.Join(err, unix.Stat(path, &st)); err != nil {
			return err
		}
		err = w.WriteHeader(&tar.Header{
			Name: "store/" + strings.TrimPrefix(path, dir+"/"), Mode: int64(st.Mode & 0o777), Size: st.Size, Format: tar.FormatPAX,
			ModTime: time.Unix(st.Mtim.Unix()), AccessTime: time.Unix(st.Atim.Unix()),
		})
		if err == nil {
			_, err = w.Write(data)
		}
		return err
	}))
	must(t, errors.Join(w.Close(), z.Close(), f.Close()))
}

// unpack makes a recorded store in a directory.
func unpack(t *testing.T, path, dir string) (k kept) {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	must(t, err)
	r := tar.NewReader(z)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return k
		}
		must(t, err)
		data, err := io.ReadAll(r)
		must(t, err)
		name, ok := strings.CutPrefix(h.Name, "store/")
		if !ok {
			must(t, json.Unmarshal(data, &k))
			continue
		}
		if name == "checkpoint" { // the machine of a killed one went down, too
			data = regexp.MustCompile(`"boot_id":"[^"]*"`).ReplaceAll(data, []byte(`"boot_id":"another"`))
		}
		to := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(to), 0o700))
		must(t, os.WriteFile(to, data, 0o600))
		must(t, os.Chmod(to, fs.FileMode(h.Mode))) //nolint:gosec // permissions
		must(t, os.Chtimes(to, h.AccessTime, h.ModTime))
	}
}

// eachRelease runs a test for each recorded store.
func eachRelease(t *testing.T, f func(t *testing.T, path string)) {
	t.Helper()
	paths, err := filepath.Glob(releaseDir + "/*.tar.gz")
	must(t, err)
	if len(paths) < 4 {
		t.Fatalf("recorded are %v, want those of version 1 and of 0.1.0 at the least", paths)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".tar.gz"), func(t *testing.T) {
			t.Parallel()
			f(t, path)
		})
	}
}

// check compares a store with what it has to tell of.
func (k kept) check(t *testing.T, s *file.Store) {
	t.Helper()
	if len(k.Blobs) < 20 || len(k.Entries) < 20 {
		t.Fatalf("only %d blobs and %d entries are recorded", len(k.Blobs), len(k.Entries))
	}
	for _, b := range k.Blobs {
		d := b.digest(t)
		wantRight(t, s, d)
		if missing(t, s, d) != 0 {
			t.Errorf("%s is said to be missing", d)
		}
	}
	for _, e := range k.Entries {
		wantEntry(t, s, e.key(t), e.Value)
	}
}

// TestRelease: a store of each release has all that it had, is written to, and is the
// same after the next start.
func TestRelease(t *testing.T) {
	t.Parallel()
	eachRelease(t, func(t *testing.T, path string) {
		dir := t.TempDir()
		k := unpack(t, path, dir)
		var more []digest.Digest
		for range 2 {
			s := openQuiet(t, recordedOptions(dir))
			k.check(t, s)
			for i := range 20 {
				data := blobtest.Random(uint64(len(more)), 1000*(i+1)) //nolint:gosec // small
				d, err := blob.PutBytes(t.Context(), s, digest.SHA256, data)
				must(t, err)
				more = append(more, d)
			}
			for _, d := range more {
				wantRight(t, s, d)
			}
			must(t, s.Close())
		}
		if version, err := os.ReadFile(filepath.Join(dir, "VERSION")); err != nil || string(version) != "mettle file store 2\n" {
			t.Errorf("VERSION is %q, %v", version, err)
		}
		if bad, err := filepath.Glob(filepath.Join(dir, "quarantine", "*")); err != nil || len(bad) > 0 {
			t.Errorf("taken for corrupt: %v, %v", bad, err)
		}
	})
}

// TestRelease_killed: a program that takes over a store may be killed at any moment of
// its start, and again, and loses nothing.
func TestRelease_killed(t *testing.T) {
	t.Parallel()
	eachRelease(t, func(t *testing.T, path string) {
		w := childWork{Dir: filepath.Join(t.TempDir(), "store"), MaxBytes: 1 << 30}
		k := unpack(t, path, w.Dir)
		for i := range 6 {
			w.killAfter(t, time.Duration(i)*8*time.Millisecond)
		}
		s := openQuiet(t, packing(w.options()))
		k.check(t, s)
	})
}

// killAfter starts the child and kills it after a while, which is about what a start
// takes.
func (w childWork) killAfter(t *testing.T, d time.Duration) {
	t.Helper()
	work, err := json.Marshal(w)
	must(t, err)
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+string(work))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	must(t, cmd.Start())
	time.Sleep(d)
	must(t, cmd.Process.Kill())
	if _ = cmd.Wait(); stderr.Len() > 0 {
		t.Errorf("the child failed: %s", stderr.String())
	}
}

// TestNew_newer: a store of a version to come is refused, in words, and nothing in it
// is changed.
func TestNew_newer(t *testing.T) {
	dir := t.TempDir()
	unpack(t, filepath.Join(releaseDir, "0.1.0.tar.gz"), dir)
	must(t, os.WriteFile(filepath.Join(dir, "VERSION"), []byte("mettle file store 3\n"), 0o600))
	must(t, os.Mkdir(filepath.Join(dir, "tmp"), 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "tmp", "theirs"), []byte("theirs"), 0o600))
	before := contents(t, dir)
	_, err := file.New(recordedOptions(dir))
	if err == nil || !strings.Contains(err.Error(), `"mettle file store 3"`) || !strings.Contains(err.Error(), `"mettle file store 2"`) {
		t.Errorf("a newer store: %v, want both versions named", err)
	}
	if diff := cmp.Diff(before, contents(t, dir)); diff != "" {
		t.Errorf("it was changed (-before +after):\n%s", diff)
	}
}

// contents is all that is in a directory but the lock, which names who had it last.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	must(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || e.Name() == "lock" {
			return err
		}
		data, err := os.ReadFile(path)
		sum := digest.Of(digest.SHA256, data)
		all[strings.TrimPrefix(path, dir)] = sum.String()
		return err
	}))
	if len(slices.Collect(maps.Keys(all))) < 20 {
		t.Fatalf("%s has only %v", dir, all)
	}
	return all
}
