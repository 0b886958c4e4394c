package bucket

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

func TestCleanPrefix(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "/": "", "/a": "a/", "a/b/": "a/b/", "/ü 1/x": "ü 1/x/",
		"a//b": "!", "../a": "!", "a/./b": "!", "a\nb": "!", "a/\xff": "!", strings.Repeat("x", 600): "!",
	} {
		got, err := CleanPrefix(in)
		if (err != nil) != (want == "!") || err == nil && got != want {
			t.Errorf("CleanPrefix(%.20q) = %q, %v; want %q", in, got, err, want)
		}
	}
}

// Names differ for different keys, and none is longer than buckets take.
func TestNames(t *testing.T) {
	s := &Store{prefix: strings.Repeat("p", maxPrefix-1) + "/"}
	seen := map[string]bool{}
	add := func(name string) {
		if seen[name] {
			t.Errorf("%s twice", name)
		}
		seen[name] = true
		if len(name) > 1024 {
			t.Errorf("%d bytes: %s", len(name), name)
		}
	}
	for _, fn := range digest.Functions() {
		d, err := digest.New(fn, digest.Of(fn, []byte("x")).Hash(), 1<<62)
		if err != nil {
			t.Fatal(err)
		}
		add(s.blobName(d))
		for _, instance := range []string{"", "a", "A", "~", "a/b", "..", strings.Repeat("a", 100), strings.Repeat("a", 101), "\x00", "~2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"} {
			k := blob.EntryKey{Instance: instance, Action: d}
			name := s.entryName(k)
			add(name)
			if got, ok := parseEntryName(strings.TrimPrefix(name, s.prefix+"ac/")); !ok || got != k {
				t.Errorf("%s is read as %+v, %v; want %+v", name, got, ok, k)
			}
		}
		long := strings.Repeat("a/", maxEncoded)
		for _, instance := range []string{long[:maxEncoded], long[:maxEncoded+1]} {
			name := s.entryName(blob.EntryKey{Instance: instance, Action: d})
			add(name)
			if got, ok := parseEntryName(strings.TrimPrefix(name, s.prefix+"ac/")); ok != (len(instance) == maxEncoded) || ok && got.Instance != instance {
				t.Errorf("%s is read as %+v, %v", name, got, ok)
			}
		}
	}
	d := digest.Of(digest.SHA1, []byte("x"))
	s.prefix = "pre/"
	if got, want := s.blobName(d), "pre/cas/sha1/"+d.Hash()+"-1"; got != want {
		t.Errorf("blob %s, want %s", got, want)
	}
	if got, want := s.entryName(blob.EntryKey{Instance: "main", Action: d}), "pre/ac/main/sha1/"+d.Hash()+"-1"; got != want {
		t.Errorf("entry %s, want %s", got, want)
	}
}

func TestRetry(t *testing.T) {
	trouble := errors.Join(ErrTransient, errors.New("503"))
	for _, c := range []struct {
		name  string
		fails int // times
		err   error
		calls int
		good  bool
	}{
		{"at_once", 0, nil, 1, true},
		{"passing", 3, trouble, 4, true},
		{"lasting", 100, trouble, 4, false},
		{"for_good", 100, errors.New("403"), 1, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start, calls := time.Now(), 0
				err := Retry{Attempts: 4, Backoff: time.Second, Timeout: time.Minute}.Do(t.Context(), func(context.Context) error {
					if calls++; calls <= c.fails {
						return c.err
					}
					return nil
				})
				if (err == nil) != c.good || !c.good && !errors.Is(err, c.err) || calls != c.calls {
					t.Errorf("error %v after %d calls, want good: %v after %d", err, calls, c.good, c.calls)
				}
				// 1 s, 2 s and 4 s, each between its quarter and its whole.
				if took := time.Since(start); calls == 4 && (took < 1750*time.Millisecond || took > 7*time.Second) {
					t.Errorf("waited %v", took)
				}
			})
		})
	}
	t.Run("cancelled_while_waiting", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			err := Retry{Attempts: 100, Backoff: time.Hour, Timeout: time.Minute}.Do(ctx, func(context.Context) error { return trouble })
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v, want DeadlineExceeded", err)
			}
		})
	})
	t.Run("silence", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			calls := 0
			err := Retry{Attempts: 3, Backoff: time.Second, Timeout: time.Minute}.Do(t.Context(), func(ctx context.Context) error {
				calls++
				<-ctx.Done()
				return ctx.Err()
			})
			if !errors.Is(err, ErrTransient) || calls != 3 {
				t.Errorf("error %v after %d calls, want ErrTransient after 3", err, calls)
			}
		})
	})
}
