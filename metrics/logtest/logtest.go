// Package logtest is a log for tests that read it while it is written. Nothing but
// tests uses it.
package logtest

import (
	"strings"
	"sync"
)

// A Buffer is a log. The zero Buffer is empty and ready. It is safe for concurrent use,
// and not to be copied.
type Buffer struct {
	mu  sync.Mutex // guards buf
	buf strings.Builder
}

// Write implements io.Writer.
func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

// String is all that was written so far.
func (b *Buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
