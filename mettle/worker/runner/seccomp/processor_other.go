//go:build linux && !amd64 && !arm64

package seccomp

const (
	auditArch = 0 // there is no filter
	otherABI  = 0
)

// ofThisProcessor are calls that only it has.
func ofThisProcessor() []call { return nil }
