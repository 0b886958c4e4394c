package gcs

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/bucket"
)

// A batch request carries up to a hundred requests for metadata as the parts of
// a multipart/mixed message, and its answer as many answers:
// https://cloud.google.com/storage/docs/batch. Each costs what it costs alone,
// but 20,000 digests are 200 round trips.

const (
	// maxBatchAnswer bounds an answer: a hundred of some 1 KiB.
	maxBatchAnswer = 4 << 20
	statFields     = "size,generation,metageneration,customTime"
)

// call is one request of a batch.
type call struct {
	method, path string
	body         []byte
}

// answer is one answer of a batch. A code of 0: there is none, because of err.
type answer struct {
	code int
	body []byte
	err  error
}

func (d *objects) path(name, query string) string {
	return "/storage/v1/b/" + url.PathEscape(d.bucket) + "/o/" + url.PathEscape(name) + "?" + query
}

// metadata is what is read of an object's.
type metadata struct {
	Size           string    `json:"size"`
	Generation     string    `json:"generation"`
	Metageneration string    `json:"metageneration"`
	CustomTime     time.Time `json:"customTime"`
}

// Stat implements bucket.ObjectReader.
func (d *objects) Stat(ctx context.Context, names []string) []bucket.Stat {
	calls := make([]call, len(names))
	for i, name := range names {
		calls[i] = call{method: http.MethodGet, path: d.path(name, "fields="+statFields)}
	}
	stats := make([]bucket.Stat, len(names))
	for i, a := range d.batch(ctx, calls) {
		stats[i] = bucket.Stat{Object: bucket.Object{Name: names[i]}}
		switch err := a.error(); {
		case err == nil:
			stats[i].Err = readStat(&stats[i], a.body)
		case !errors.Is(err, blob.ErrNotFound):
			stats[i].Err = err
		}
	}
	return stats
}

func readStat(st *bucket.Stat, body []byte) error {
	var m metadata
	err := json.Unmarshal(body, &m)
	if err == nil {
		st.SizeBytes, err = strconv.ParseInt(m.Size, 10, 64)
	}
	if err == nil && st.SizeBytes < 0 {
		err = fmt.Errorf("a size of %s", m.Size)
	}
	if err == nil && m.Generation == "" {
		err = errors.New("no generation")
	}
	if err != nil {
		return fmt.Errorf("%w: metadata of %s: %w", bucket.ErrTransient, st.Name, err)
	}
	st.Exists, st.Used, st.Version = true, m.CustomTime, m.Generation+"."+m.Metageneration
	return nil
}

// Touch implements bucket.ObjectWriter. The metageneration sees to it that a
// time never goes back, which Google refuses, and makes trying again safe.
func (d *objects) Touch(ctx context.Context, os []bucket.Object) []error {
	body, err := json.Marshal(map[string]time.Time{"customTime": time.Now().UTC()})
	calls := make([]call, len(os))
	errs := make([]error, len(os))
	for i, o := range os {
		generation, meta, parseErr := parseVersion(o.Version)
		if err := errors.Join(err, parseErr); err != nil {
			errs[i] = err
			return errs
		}
		query := fmt.Sprintf("fields=generation&ifGenerationMatch=%d", generation)
		if meta != "" {
			query += "&ifMetagenerationMatch=" + url.QueryEscape(meta)
		}
		calls[i] = call{method: http.MethodPatch, path: d.path(o.Name, query), body: body}
	}
	for i, a := range d.batch(ctx, calls) {
		errs[i] = a.error()
	}
	return errs
}

// batch makes the calls in one request. There are as many answers.
func (d *objects) batch(ctx context.Context, calls []call) []answer {
	answers := make([]answer, len(calls))
	err := d.batchInto(ctx, calls, answers)
	for i := range answers {
		if answers[i].code != 0 || answers[i].err != nil {
			continue
		}
		if answers[i].err = err; err == nil {
			answers[i].err = fmt.Errorf("%w: the batch has no answer %d", bucket.ErrTransient, i)
		}
	}
	return answers
}

// batchInto fills in the answers that came.
func (d *objects) batchInto(ctx context.Context, calls []call, answers []answer) error {
	body, contentType, err := formatBatch(calls)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, d.endpoint+"/batch/storage/v1", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := d.http.Do(req)
	if err != nil {
		return classify(err)
	}
	defer resp.Body.Close() //nolint:errcheck // opened for reading
	limited := io.LimitReader(resp.Body, maxBatchAnswer)
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(limited) // for the message alone
		err := fmt.Errorf("batch of %d requests: %s: %.300q", len(calls), resp.Status, text)
		if resp.StatusCode == http.StatusNotFound {
			return err // of the server's path, and nothing of an object
		}
		return classifyCode(resp.StatusCode, err)
	}
	if err := parseBatch(resp.Header.Get("Content-Type"), limited, answers); err != nil {
		return classify(fmt.Errorf("answer to a batch: %w", err))
	}
	_, _ = io.Copy(io.Discard, limited) // so that the connection is used again
	return nil
}

func formatBatch(calls []call) (body []byte, contentType string, err error) {
	var b bytes.Buffer
	b.Grow(len(calls) * 512)
	w := multipart.NewWriter(&b)
	for i, c := range calls {
		part, err := w.CreatePart(textproto.MIMEHeader{
			"Content-Type":              {"application/http"},
			"Content-Transfer-Encoding": {"binary"},
			"Content-Id":                {"<" + strconv.Itoa(i) + ">"},
		})
		if err != nil {
			return nil, "", err
		}
		fmt.Fprintf(part, "%s %s HTTP/1.1\r\n", c.method, c.path)
		if c.body != nil {
			fmt.Fprintf(part, "Content-Type: application/json\r\nContent-Length: %d\r\n", len(c.body))
		}
		fmt.Fprintf(part, "\r\n%s", c.body)
	}
	if err := w.Close(); err != nil {
		return nil, "", err
	}
	return b.Bytes(), "multipart/mixed; boundary=" + w.Boundary(), nil
}

// parseBatch reads the answers, in any order, up to the first malformed one.
func parseBatch(contentType string, body io.Reader, answers []answer) error {
	_, params, err := mime.ParseMediaType(contentType)
	if err != nil {
		return err
	}
	for r := multipart.NewReader(body, params["boundary"]); ; {
		part, err := r.NextRawPart()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		id, _ := strings.CutPrefix(strings.Trim(part.Header.Get("Content-ID"), "<>"), "response-")
		i, err := strconv.Atoi(id)
		if err != nil || i < 0 || i >= len(answers) {
			return fmt.Errorf("a part has the id %.50q", part.Header.Get("Content-ID"))
		}
		resp, err := http.ReadResponse(bufio.NewReader(part), nil)
		if err != nil {
			return err
		}
		text, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			return err
		}
		answers[i] = answer{code: resp.StatusCode, body: text}
	}
}

// error is the answer's class.
func (a answer) error() error {
	switch {
	case a.err != nil:
		return a.err
	case a.code == http.StatusOK:
		return nil
	}
	err := fmt.Errorf("status %d: %.300q", a.code, a.body)
	if a.code == http.StatusNotFound && aboutBucket(string(a.body)) {
		return err
	}
	return classifyCode(a.code, err)
}

// aboutBucket reports whether a 404 is the bucket's, of which nothing but the
// words tells. It says nothing of the object.
func aboutBucket(text string) bool { return strings.Contains(text, "bucket does not exist") }
