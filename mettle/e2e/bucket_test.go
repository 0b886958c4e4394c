package e2e_test

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
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

// gatewayVar is set to the path of Versity's S3 gateway to have that as the object
// store, over a directory. What is in it outlives its process.
const gatewayVar = "METTLE_E2E_VERSITYGW"

// newBucket is such a process, which has yet to be started.
func newBucket(t *testing.T) *server {
	t.Helper()
	if gateway := os.Getenv(gatewayVar); gateway != "" {
		s, dir := newServer(t, gateway, nil), storeDir(t)
		if err := os.MkdirAll(filepath.Join(dir, bucketName), 0o700); err != nil {
			t.Fatal(err)
		}
		s.args = []string{"--port=" + s.Addr(), "--region=here", "--keep-alive", "--quiet", "posix", dir}
		s.env = []string{"ROOT_ACCESS_KEY=id", "ROOT_SECRET_KEY=secret"}
		s.says = "single account mode"
		return s
	}
	s := newSelf(t, "bucket at")
	s.env = []string{bucketVar + "=" + s.Addr()}
	return s
}
