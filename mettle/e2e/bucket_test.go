package e2e_test

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
)

// bucketVar is set for a process of this test that is an object store.
const bucketVar = "METTLE_E2E_BUCKET"

// bucketName is that of the only bucket that it has.
const bucketName = "blobs"

// bucketMain serves an object store with an empty bucket, in memory, at addr,
// until the process is killed. It returns the process's exit status.
func bucketMain(addr string) int {
	backend := s3mem.New()
	if err := backend.CreateBucket(bucketName); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	l, err := net.Listen("tcp", addr) //nolint:noctx // at once
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("bucket at", l.Addr())
	server := &http.Server{Handler: gofakes3.New(backend).Server(), ReadHeaderTimeout: time.Minute}
	fmt.Fprintln(os.Stderr, server.Serve(l))
	return 1
}

// newBucket is such a process, which has yet to be started.
func newBucket(t *testing.T) *server {
	t.Helper()
	s := newSelf(t, "bucket at")
	s.env = []string{bucketVar + "=" + s.Addr()}
	return s
}
