package gcs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/bucket"
	"github.com/mettle-build/mettle/elan/digest"
)

// batchServer answers every part of a batch by what respond says of the number
// of times that its path was asked for; "" leaves the answer out.
func batchServer(t *testing.T, respond func(path string, times int) string) (*bucket.Store, func() int) {
	t.Helper()
	var mu sync.Mutex // held while a batch is answered
	times := map[string]int{}
	requests := 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, "/batch/") {
			_, _ = io.WriteString(w, `{"kind":"storage#objects"}`)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		requests++
		_, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
		if err != nil {
			t.Error(err)
		}
		var answer bytes.Buffer
		mw := multipart.NewWriter(&answer)
		mr := multipart.NewReader(r.Body, params["boundary"])
		for i := 0; ; i++ {
			part, err := mr.NextPart()
			if err != nil {
				break
			}
			text, err := io.ReadAll(part)
			if err != nil {
				t.Error(err)
			}
			path := strings.Fields(string(text))[1]
			times[path]++
			if body := respond(path, times[path]); body != "" {
				pw, err := mw.CreatePart(map[string][]string{"Content-Type": {"application/http"}, "Content-ID": {"<response-" + strconv.Itoa(i) + ">"}})
				if err != nil {
					t.Error(err)
				}
				_, _ = io.WriteString(pw, body)
			}
		}
		_ = mw.Close()
		w.Header().Set("Content-Type", "multipart/mixed; boundary="+mw.Boundary())
		_, _ = w.Write(answer.Bytes())
	}))
	t.Cleanup(srv.Close)
	t.Setenv("STORAGE_EMULATOR_HOST", srv.URL)
	s, err := New(t.Context(), Options{Bucket: "b", Options: bucket.Options{Attempts: 3, Backoff: time.Millisecond}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s, func() int {
		mu.Lock()
		defer mu.Unlock()
		return requests
	}
}

func httpAnswer(code int, body string) string {
	return fmt.Sprintf("HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", code, len(body), body)
}

func present(path string) string {
	_, size, _ := strings.Cut(path, "-")
	size, _, _ = strings.Cut(size, "?")
	return httpAnswer(http.StatusOK, fmt.Sprintf(`{"size":%q,"generation":"7","metageneration":"1","customTime":%q}`, size, time.Now().UTC().Format(time.RFC3339Nano)))
}

func TestFindMissing_of_a_batch_with_one_strange_answer(t *testing.T) {
	var ds []digest.Digest
	for i := range 250 {
		ds = append(ds, digest.Of(digest.SHA256, []byte(strconv.Itoa(i))))
	}
	absent := httpAnswer(http.StatusNotFound, `{"error":{"message":"No such object: b/x"}}`)
	for _, c := range []struct {
		name     string
		first    string // of the strange one
		then     string // "": it is there
		missing  int
		fails    bool
		requests int
	}{
		{"absent", absent, absent, 1, false, 3},
		{"passing_503", httpAnswer(http.StatusServiceUnavailable, ""), "", 0, false, 4},
		{"passing_429_then_absent", httpAnswer(http.StatusTooManyRequests, ""), absent, 1, false, 4},
		{"lasting_503", httpAnswer(http.StatusServiceUnavailable, ""), httpAnswer(http.StatusServiceUnavailable, ""), 0, true, 5},
		{"forbidden", httpAnswer(http.StatusForbidden, ""), "", 0, true, 3},
		{"bucket_gone", httpAnswer(http.StatusNotFound, `{"error":{"message":"The specified bucket does not exist."}}`), "", 0, true, 3},
		{"rubbish", httpAnswer(http.StatusOK, `{"size":"many"}`), "", 0, false, 4},
		{"half_an_answer", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "", 0, false, 4},
		{"no_http", "hello", "", 0, false, 4},
	} {
		t.Run(c.name, func(t *testing.T) {
			strange := ds[130].Hash()
			s, requests := batchServer(t, func(path string, times int) string {
				switch {
				case !strings.Contains(path, strange):
					return present(path)
				case times == 1:
					return c.first
				case c.then != "":
					return c.then
				}
				return present(path)
			})
			missing, err := s.FindMissing(t.Context(), ds)
			if (err != nil) != c.fails || c.fails && !errors.Is(err, blob.ErrUnavailable) || errors.Is(err, blob.ErrNotFound) {
				t.Errorf("error %v, want one: %v", err, c.fails)
			}
			if len(missing) != c.missing || len(missing) == 1 && missing[0] != ds[130] {
				t.Errorf("missing are %v, want %d", missing, c.missing)
			}
			// Batches after one that failed may not be made any more.
			if got := requests(); got > c.requests || !c.fails && got != c.requests {
				t.Errorf("%d requests, want %d", got, c.requests)
			}
		})
	}
	t.Run("left_out", func(t *testing.T) {
		s, _ := batchServer(t, func(string, int) string { return "" })
		if missing, err := s.FindMissing(t.Context(), ds); !errors.Is(err, blob.ErrUnavailable) {
			t.Errorf("missing %v, error %v; want ErrUnavailable", missing, err)
		}
	})
}

func FuzzParseBatch(f *testing.F) {
	f.Add("multipart/mixed; boundary=x", []byte("--x\r\nContent-ID: <response-1>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}\r\n--x--\r\n"))
	f.Add("multipart/mixed; boundary=x", []byte("--x\r\nContent-ID: <response-9>\r\n\r\nHTTP/1.1 200 OK\r\n\r\n--x--\r\n"))
	f.Add("text/html", []byte("<html>"))
	f.Fuzz(func(t *testing.T, contentType string, body []byte) {
		answers := make([]answer, 3)
		if err := parseBatch(contentType, bytes.NewReader(body), answers); err != nil {
			return
		}
		for _, a := range answers {
			if a.code != 0 && a.code < 100 {
				t.Errorf("an answer has the status %d", a.code)
			}
		}
	})
}
