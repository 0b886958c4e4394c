package digest_test

import (
	"bytes"
	"errors"
	"io"
	"math"
	"testing"

	"github.com/mettle-build/mettle/elan/digest"
)

// A declared size is a foreign number: the largest one must not overflow.
func TestVerifier_of_the_largest_size(t *testing.T) {
	d, err := digest.New(digest.SHA256, digest.Of(digest.SHA256, []byte("x")).Hash(), math.MaxInt64)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(digest.NewVerifier(bytes.NewReader([]byte("x")), d)); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("ReadAll: %v, want ErrMismatch", err)
	}
}

func TestVerifier_reads_one_byte_past_the_size(t *testing.T) {
	for _, tc := range []struct {
		name, data string
		good       bool
	}{{"exact", "hello", true}, {"short", "hell", false}, {"long", "hello!", false}, {"much longer", "hello, world", false}, {"other", "Hello", false}} {
		t.Run(tc.name, func(t *testing.T) {
			r := bytes.NewReader([]byte(tc.data))
			_, err := io.ReadAll(digest.NewVerifier(r, digest.Of(digest.SHA256, []byte("hello"))))
			if (err == nil) != tc.good || (!tc.good && !errors.Is(err, digest.ErrMismatch)) {
				t.Errorf("ReadAll: %v, want good: %v", err, tc.good)
			}
			if read := len(tc.data) - r.Len(); read > 6 {
				t.Errorf("%d bytes were read, want at most 6", read)
			}
		})
	}
}
