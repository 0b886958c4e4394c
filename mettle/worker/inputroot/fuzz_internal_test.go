//go:build linux

package inputroot

import (
	"encoding/binary"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// FuzzParseDirents: what the kernel has written is read without a step beyond it.
func FuzzParseDirents(f *testing.F) {
	const nameAt = int(unsafe.Offsetof(unix.Dirent{}.Name))
	one := make([]byte, nameAt+8)
	binary.NativeEndian.PutUint16(one[unsafe.Offsetof(unix.Dirent{}.Reclen):], uint16(len(one)))
	copy(one[nameAt:], "a")
	f.Add(one)
	f.Add(append(one, one...))
	f.Add(append(one, one[:nameAt+1]...))
	f.Add(make([]byte, 64))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, e := range parseDirents(data) {
			if e.name == "." || e.name == ".." || strings.ContainsRune(e.name, 0) || len(e.name) > len(data) {
				t.Errorf("entry %+v", e)
			}
		}
	})
}
