package bucket

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
)

// The classes of a driver's errors, beside blob.ErrNotFound and blob.ErrFull.
// An error of none of them is for good: the call is not tried again.
var (
	// ErrTransient: the same request may succeed in a moment. It is tried again.
	ErrTransient = errors.New("transient trouble of the bucket")
	// ErrChanged: the object is not, or no longer, what a Condition says.
	ErrChanged = errors.New("the object is there already, or has changed")
	// ErrRange: the object has fewer bytes than the offset asked for.
	ErrRange = errors.New("the object is shorter")
)

// Objects is what a driver does for a Store: one request each, without trying
// again, safe for concurrent use.
type Objects interface {
	ObjectReader
	ObjectWriter
	// Check makes sure that the bucket is there and may be read, so that "not
	// found" never means the bucket.
	Check(ctx context.Context) error
	// Close frees the connections.
	Close() error
}

// ObjectReader reads and looks at objects.
type ObjectReader interface {
	// Stat asks for all names, of which there are at most Driver.BatchSize, in
	// one request. The answers are in the order of the names.
	Stat(ctx context.Context, names []string) []Stat
	// Get returns the bytes of an object from offset, in bytes, and what is
	// known of it. The context bounds the reading too.
	Get(ctx context.Context, name string, offset int64) (io.ReadCloser, Object, error)
	// List returns some objects whose names begin with prefix, in one request,
	// in the order of their names. token is that of the page before, and next
	// that of the page after; both are "" where there is none.
	List(ctx context.Context, prefix, token string) (os []Object, next string, err error)
}

// ObjectWriter changes objects. A change is whole, or not at all.
type ObjectWriter interface {
	// Put writes an object of which all bytes are there. It does not keep data.
	Put(ctx context.Context, name string, data []byte, c Condition) error
	// Upload begins an object of sizeBytes, more than Options.ChunkBytes, or of
	// which the size is not known yet, and sizeBytes negative. The
	// pieces are tried again inside. The context bounds all of the upload.
	Upload(ctx context.Context, name string, sizeBytes int64, c Condition) (Upload, error)
	// Touch makes the objects' last use now, if they are still the same
	// version, in one request; at most Driver.BatchSize of them. The errors are
	// in the order of the objects; ErrChanged is as good as nil.
	Touch(ctx context.Context, os []Object) []error
	// Delete removes an object.
	Delete(ctx context.Context, name string) error
}

// Upload is an object that is written in pieces, by one goroutine at a time.
type Upload interface {
	io.Writer
	// Commit makes the object visible.
	Commit() error
	// Abort gives it up, and frees what is held. After Commit it does nothing.
	Abort() error
}

// Object is what a bucket knows of one.
type Object struct {
	Name      string
	SizeBytes int64
	// Used is when the object's lifetime was last begun. Zero: not known.
	Used time.Time
	// Version changes whenever the object does. The driver alone reads it.
	Version string
	// CRC32C is that of all bytes. nil: not known.
	CRC32C *uint32
}

// Stat is an answer about one object: Err, or that it is there, or neither.
type Stat struct {
	Object
	Exists bool
	Err    error
}

// Condition says when an object may be written. The zero Condition: always.
type Condition struct {
	// Absent: only where there is no object.
	Absent bool
	// Version: only where the object is of this version.
	Version string
}

// Driver is a kind of bucket.
type Driver struct {
	Objects
	// Kind is the first word of the errors, and stands in the metrics' names: gcs, s3.
	Kind string
	// BatchSize is how many objects Stat and Touch take in a request.
	BatchSize int
	// MaxBytes is the size of the largest object.
	MaxBytes int64
}

// transient reports whether a request is worth another attempt.
func transient(err error) bool { return errors.Is(err, ErrTransient) }

// inClass reports whether an error's class is one that a store's callers know.
func inClass(err error) bool {
	for _, class := range []error{
		blob.ErrNotFound, blob.ErrCorrupt, blob.ErrTooLarge, blob.ErrFull, blob.ErrUnavailable, ErrChanged,
		context.Canceled, context.DeadlineExceeded,
	} {
		if errors.Is(err, class) {
			return true
		}
	}
	return false
}
