package creds

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// A File is one by which this process shows who it is, or knows others by.
type File struct {
	// Use is what for, the label of its metrics: one of few words, such as server.
	Use string
	// Path is where it is. "": there is none, and no metrics.
	Path string
	// Key is that of the certificate in the file. "": the file has authorities, or,
	// where Opaque is set, something else.
	Key string
	// Opaque says that there is no certificate in it: a token, say.
	Opaque bool
	// Check says of an opaque file what is wrong with what is in it. nil: it is not
	// to be empty.
	Check func(data []byte) error
}

// Watch has metrics tell until when the certificates in files are good, whether the
// files can be used, and how old they are. The files are read when somebody asks for
// the metrics, which is how often they are small and local enough to be. A nil
// Registerer is told nothing.
func Watch(r prometheus.Registerer, files ...File) error {
	if r == nil {
		return nil
	}
	for _, f := range files {
		if f.Path == "" {
			continue
		}
		if err := r.Register(newWatched(f)); err != nil {
			return fmt.Errorf("register the metrics of %s: %w", f.Path, err)
		}
	}
	return nil
}

// PolicyFile is that of a policy, "" for none.
func PolicyFile(path string) File {
	return File{Use: "policy", Path: path, Opaque: true, Check: func(data []byte) error {
		_, err := parsePolicy(data, filepath.Dir(path))
		return err
	}}
}

// TokenFile is one with the token that a client sends, "" for none.
func TokenFile(use, path string) File {
	return File{Use: use, Path: path, Opaque: true, Check: func(data []byte) error {
		_, err := tokenIn(path, data)
		return err
	}}
}

// watched collects the metrics of one file.
type watched struct {
	f                       File
	end, usable, modifiedAt *prometheus.Desc

	// mu guards last: what the file said when it could be used.
	mu   sync.Mutex
	last time.Time
}

func newWatched(f File) *watched {
	labels := prometheus.Labels{"use": f.Use}
	desc := func(name, help string) *prometheus.Desc { return prometheus.NewDesc("creds_"+name, help, nil, labels) }
	return &watched{
		f: f,
		end: desc("certificate_not_after_timestamp_seconds",
			"Until when the certificate in a file is good, with those between it and its authority; of a file of authorities, the one that is good for longest. By what the file is for."),
		usable: desc("file_usable", "1 where a file can be read and has what it should, else 0: what was read before stays in force, and a restart would fail."),
		modifiedAt: desc("file_modified_timestamp_seconds",
			"When a file of credentials was written last: whether what renews it does."),
	}
}

// Describe implements prometheus.Collector.
func (w *watched) Describe(ch chan<- *prometheus.Desc) {
	ch <- w.usable
	ch <- w.modifiedAt
	if !w.f.Opaque {
		ch <- w.end
	}
}

// Collect implements prometheus.Collector.
func (w *watched) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64) { ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v) }
	if st, err := os.Stat(w.f.Path); err == nil {
		gauge(w.modifiedAt, float64(st.ModTime().UnixMilli())/1e3)
	}
	end, err := w.f.notAfter()
	if err != nil {
		gauge(w.usable, 0)
	} else {
		gauge(w.usable, 1)
	}
	if w.f.Opaque {
		return
	}
	w.mu.Lock()
	if err == nil {
		w.last = end
	}
	end = w.last
	w.mu.Unlock()
	if !end.IsZero() {
		gauge(w.end, float64(end.Unix()))
	}
}

// notAfter reads until when the file is good; the zero time of an opaque one.
func (f File) notAfter() (time.Time, error) {
	data, err := readFile(f.Path)
	if err != nil {
		return time.Time{}, err
	}
	if f.Opaque && f.Check != nil {
		return time.Time{}, f.Check(data)
	}
	if f.Opaque {
		if len(data) == 0 {
			return time.Time{}, fmt.Errorf("%s is empty", f.Path)
		}
		return time.Time{}, nil
	}
	if f.Key != "" {
		key, err := readFile(f.Key)
		if err != nil {
			return time.Time{}, err
		}
		pair, err := keyPair(data, key, f.Path, f.Key)
		if err != nil {
			return time.Time{}, err
		}
		return chainEnd(pair)
	}
	return latestEnd(data)
}

// chainEnd is when the first certificate of a chain ends: from then on it is none.
func chainEnd(pair tls.Certificate) (end time.Time, err error) {
	for _, der := range pair.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return end, err
		}
		if end.IsZero() || c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return end, nil
}

// latestEnd is when the last certificate in a PEM file ends: while one authority is
// replaced by the next, a file has both.
func latestEnd(data []byte) (end time.Time, err error) {
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			continue // as x509.CertPool does
		}
		if c.NotAfter.After(end) {
			end = c.NotAfter
		}
	}
	if end.IsZero() {
		return end, errors.New("there is no certificate in PEM form")
	}
	return end, nil
}
