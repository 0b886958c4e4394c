package file_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
)

// roundsEnv says how often TestStore_kill kills; `make crash` does it 300 times.
const roundsEnv = "METTLE_TEST_CRASH_ROUNDS"

// TestStore_kill kills a process that writes, at random moments, and then
// compares all that it acknowledged. Every other round is in a small store that
// evicts all the time, where only what is within its lifetime must be there.
func TestStore_kill(t *testing.T) {
	rounds := 20
	if testing.Short() {
		rounds = 3
	}
	if s := os.Getenv(roundsEnv); s != "" {
		var err error
		if rounds, err = strconv.Atoi(s); err != nil {
			t.Fatalf("%s: %v", roundsEnv, err)
		}
	}
	base := t.TempDir()
	large := &crashed{t: t, work: childWork{Dir: filepath.Join(base, "large", "store")}, over: map[string]int64{}}
	small := &crashed{t: t, work: childWork{Dir: filepath.Join(base, "small", "store"), MaxBytes: 8 << 20, Lifetime: time.Second}, over: map[string]int64{}}
	for i := range rounds {
		if i%2 == 0 {
			large.round(i >= rounds-2)
		} else {
			small.round(false)
		}
	}
	wantOnlyWhole(t, large.work.Dir)
	wantOnlyWhole(t, small.work.Dir)
	for name, c := range map[string]*crashed{"large": large, "small": small} {
		t.Logf("%s store: %d kills, %d of them before the first acknowledgement; %d acknowledgements, %d comparisons, %d evicted after their lifetime",
			name, c.rounds, c.early, c.acks, c.compared, c.evicted)
	}
	if large.compared < large.acks || rounds > 1 && small.compared == 0 {
		t.Error("not all that was acknowledged was compared")
	}
}

// crashed is a store that is killed again and again.
type crashed struct {
	t    *testing.T
	work childWork
	all  []ack            // blob, entry and gone
	over map[string]int64 // the last number of each entry that is written again

	rounds, early, acks, compared, evicted int
}

// round kills a process, and compares what it acknowledged and some of what
// others did before, or all of that.
func (c *crashed) round(all bool) {
	c.t.Helper()
	acks := c.kill()
	c.rounds++
	c.acks += len(acks)
	if len(acks) == 0 {
		c.early++
	}
	compare := make([]ack, 0, len(acks))
	for _, a := range acks {
		if a.Kind == "over" {
			c.over[a.Name] = max(c.over[a.Name], a.N)
		} else {
			compare = append(compare, a)
		}
	}
	if all {
		compare = append(compare, c.all...)
	} else {
		for range min(100, len(c.all)) {
			compare = append(compare, c.all[rand.IntN(len(c.all))])
		}
	}
	c.all = append(c.all, acks...)
	s, err := file.New(c.work.options())
	must(c.t, err)
	if tmp, err := os.ReadDir(filepath.Join(c.work.Dir, "tmp")); err != nil || len(tmp) > 0 {
		c.t.Errorf("%d files left in tmp, error %v", len(tmp), err)
	}
	for _, a := range compare {
		c.compare(s, a)
	}
	c.compareOver(s)
	end := s.Close
	if rand.IntN(2) == 0 {
		end = s.Crash
	}
	must(c.t, end())
}

// kill runs the child until a random moment, and returns what it acknowledged.
func (c *crashed) kill() []ack {
	c.t.Helper()
	must(c.t, os.MkdirAll(filepath.Dir(c.work.Dir), 0o700))
	work, err := json.Marshal(c.work)
	must(c.t, err)
	cmd := exec.CommandContext(c.t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+string(work))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	must(c.t, err)
	must(c.t, cmd.Start())
	// As often as not by the clock, and then as often as not while it starts.
	after, killed := 1+rand.IntN(400), false
	kill := func() { _ = cmd.Process.Kill() }
	if n := rand.IntN(4); n < 2 {
		after, killed = -1, true
		delay := time.Duration(rand.IntN(50+n*450)) * time.Millisecond
		defer time.AfterFunc(delay, kill).Stop()
	}
	var acks []ack
	for r := bufio.NewReader(out); ; {
		line, err := r.ReadBytes('\n')
		if err != nil {
			break // what has no end was not acknowledged
		}
		var a ack
		must(c.t, json.Unmarshal(line, &a))
		if acks = append(acks, a); len(acks) == after {
			killed = true
			kill()
		}
	}
	if err := cmd.Wait(); !killed || stderr.Len() > 0 {
		c.t.Fatalf("the child ended by itself: %v: %s", err, stderr.String())
	}
	links, err := filepath.Glob(filepath.Join(filepath.Dir(c.work.Dir), "work*"))
	must(c.t, err)
	for _, dir := range links {
		must(c.t, os.RemoveAll(dir))
	}
	return acks
}

// compare compares what was acknowledged with what is there.
func (c *crashed) compare(s *file.Store, a ack) {
	c.t.Helper()
	if a.Kind == "over" {
		return // see compareOver
	}
	d, err := digest.Parse(a.Name)
	must(c.t, err)
	c.compared++
	var data []byte
	if a.Kind == "blob" {
		data, err = blob.ReadAll(c.t.Context(), s, d, 1<<20)
	} else {
		data, err = s.Entry(c.t.Context(), blob.EntryKey{Instance: "i", Action: d})
	}
	switch {
	case a.Kind == "gone":
		if !errors.Is(err, blob.ErrNotFound) {
			c.t.Errorf("%+v was acknowledged; now %d bytes, error %v; want ErrNotFound", a, len(data), err)
		}
	case errors.Is(err, blob.ErrNotFound) && c.old(a.At):
		c.evicted++
	case err != nil || digest.Of(digest.SHA256, data) != d:
		c.t.Errorf("%+v was acknowledged; now error %v, digest %s", a, err, digest.Of(digest.SHA256, data))
	}
}

// old reports whether what was used at that time may have been evicted.
func (c *crashed) old(at time.Time) bool {
	return c.work.Lifetime > 0 && time.Since(at) > c.work.Lifetime
}

// compareOver: an entry that was replaced has the value that was acknowledged
// last, or one that was being written later.
func (c *crashed) compareOver(s *file.Store) {
	c.t.Helper()
	for name, n := range c.over {
		d, err := digest.Parse(name)
		must(c.t, err)
		c.compared++
		value, err := s.Entry(c.t.Context(), blob.EntryKey{Instance: "over", Action: d})
		if errors.Is(err, blob.ErrNotFound) && c.old(time.Unix(0, n)) {
			c.evicted++
			continue
		}
		if err != nil || len(value) < 19 {
			c.t.Errorf("entry %s with number %d was acknowledged; now %d bytes, error %v", name, n, len(value), err)
			continue
		}
		if got, err := strconv.ParseInt(string(value[:19]), 10, 64); err != nil || got < n {
			c.t.Errorf("entry %s with number %d was acknowledged; now it has %d, error %v", name, n, got, err)
		} else {
			c.over[name] = got
		}
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
