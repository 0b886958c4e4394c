package file_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
)

// writeUntilKilled is the child: four writers that put, adopt and link blobs
// and put entries, and print each digest once it was acknowledged.
func writeUntilKilled(dir string) error {
	s, err := file.New(file.Options{Dir: dir})
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp(filepath.Dir(dir), "work")
	if err != nil {
		return err
	}
	errs := make(chan error)
	for i := range 4 {
		go func() { // ends with the process
			for n := 0; ; n++ {
				if err := writeOne(s, filepath.Join(work, fmt.Sprint(i, "-", n)), n%4); err != nil {
					errs <- err
					return
				}
			}
		}()
	}
	return <-errs
}

func writeOne(s *file.Store, path string, kind int) error {
	ctx := context.Background()
	data := blobtest.Random(rand.Uint64(), 1+rand.IntN(200_000))
	d := digest.Of(digest.SHA256, data)
	var err error
	switch kind {
	case 0:
		err = blob.ReceiveBytes(ctx, s, d, data)
	case 1:
		err = blob.Receive(ctx, s, d, bytes.NewReader(data))
		if err == nil {
			err = s.Link(ctx, d, path, blob.LinkExecutable)
		}
	case 2:
		if err = os.WriteFile(path, data, 0o600); err == nil {
			err = adoptPath(ctx, s, path)
		}
	case 3:
		err = s.PutEntry(ctx, blob.EntryKey{Instance: "i", Action: d}, data)
		if err == nil {
			_, err = fmt.Printf("entry %s\n", d)
		}
		return err
	}
	if err == nil {
		_, err = fmt.Printf("blob %s\n", d)
	}
	return err
}

func adoptPath(ctx context.Context, s *file.Store, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = s.Adopt(ctx, digest.SHA256, f)
	return err
}

func TestStore_kill(t *testing.T) {
	rounds := 20
	if testing.Short() {
		rounds = 3
	}
	dir := filepath.Join(t.TempDir(), "store")
	var all []string
	for i := range rounds {
		acked := killed(t, dir, 1+rand.IntN(200))
		all = append(all, acked...)
		if i == rounds-1 {
			acked = all
		}
		s, err := file.New(file.Options{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		if tmp, err := os.ReadDir(filepath.Join(dir, "tmp")); err != nil || len(tmp) > 0 {
			t.Errorf("%d files left in tmp, error %v", len(tmp), err)
		}
		for _, line := range acked {
			wantAcked(t, s, line)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	wantOnlyWhole(t, dir)
}

// killed runs the child, kills it after so many acknowledgements, and returns
// all that it gave.
func killed(t *testing.T, dir string, after int) []string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+dir)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var lines []string
	for r := bufio.NewReader(out); ; {
		line, err := r.ReadString('\n')
		if err != nil {
			break // what has no end was not acknowledged
		}
		if lines = append(lines, strings.TrimSpace(line)); len(lines) == after {
			if err := cmd.Process.Kill(); err != nil {
				t.Error(err)
			}
		}
	}
	err = cmd.Wait()
	if len(lines) < after {
		t.Fatalf("the child ended by itself: %v: %s", err, stderr.String())
	}
	return lines
}

func wantAcked(t *testing.T, s *file.Store, line string) {
	t.Helper()
	kind, name, _ := strings.Cut(line, " ")
	d, err := digest.Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	var data []byte
	if kind == "entry" {
		data, err = s.Entry(t.Context(), blob.EntryKey{Instance: "i", Action: d})
	} else {
		data, err = blob.ReadAll(t.Context(), s, d, 1<<20)
	}
	if got := digest.Of(digest.SHA256, data); err != nil || got != d {
		t.Errorf("%s was acknowledged; now error %v, digest %s", line, err, got)
	}
}

// wantOnlyWhole looks at the files themselves: acknowledged or not, each has
// the bytes that its name says.
func wantOnlyWhole(t *testing.T, dir string) {
	t.Helper()
	files := 0
	err := filepath.WalkDir(filepath.Join(dir, "cas"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		files++
		data, err := os.ReadFile(path)
		d := digest.Of(digest.SHA256, data)
		if want := fmt.Sprintf("%s-%d", d.Hash(), d.Size()); strings.TrimSuffix(e.Name(), ".x") != want {
			t.Errorf("file %s has the bytes of %s", path, want)
		}
		return err
	})
	if err != nil || files == 0 {
		t.Errorf("%d files, error %v", files, err)
	}
}
