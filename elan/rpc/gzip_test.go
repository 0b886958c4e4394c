package rpc_test

import (
	"testing"

	"google.golang.org/grpc/encoding"
)

// Clients may compress their messages by gzip, whichever program serves them. That
// gzip is there by way of some other package would not do.
func TestNewServer_takesGzip(t *testing.T) {
	if encoding.GetCompressor("gzip") == nil {
		t.Error("messages that are compressed by gzip are refused")
	}
}
