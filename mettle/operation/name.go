package operation

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/mettle-build/mettle/elan/digest"
)

// ErrBadName is wrapped by the errors about names that this project never gave.
var ErrBadName = errors.New("not an operation name of this server")

// MaxInstanceBytes bounds the instance names that go into operation names.
const MaxInstanceBytes = 1024

// maxNameBytes is more than the longest name has: see Append.
const maxNameBytes = MaxInstanceBytes + 512

// prefix begins every name. The first segment is what the HTTP path of
// WaitExecution demands, {name=operations/**}, and the second is the version of
// the rest.
const prefix = "operations/v1/"

// A Name is the name of an operation, taken apart. It is comparable.
type Name struct {
	// Instance is the instance name of the request, any string without NUL of
	// up to MaxInstanceBytes.
	Instance string
	// Action is the digest of the Action.
	Action digest.Digest
	// SkipCacheLookup and Priority are those of the ExecuteRequest.
	SkipCacheLookup bool
	Priority        int32
	// Created is when the client asked, in whole microseconds. Results that
	// are older do not answer a request with SkipCacheLookup.
	Created time.Time
	// Random tells apart operations that have all else in common. Nobody can guess it:
	// who knows the name may wait for the operation, and cancel it.
	Random uint64
}

// NewName completes n to a name that nobody else has: it sets Created and Random.
func NewName(n Name) Name {
	n.Created = time.UnixMicro(time.Now().UnixMicro())
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	n.Random = binary.LittleEndian.Uint64(b[:])
	return n
}

// String is the name as clients see it.
func (n Name) String() string {
	return string(n.Append(make([]byte, 0, len(prefix)+64+len(n.Action.Hash())+32+len(n.Instance))))
}

// Append appends String to b.
func (n Name) Append(b []byte) []byte {
	b = append(b, prefix...)
	b = strconv.AppendInt(b, n.Created.UnixMicro(), 36)
	b = append(b, '.')
	b = strconv.AppendUint(b, n.Random, 36)
	b = append(b, '/')
	b = n.appendFlags(b)
	b = append(b, '/')
	b = append(b, n.Action.Function().String()...)
	b = append(b, '/')
	b = append(b, n.Action.Hash()...)
	b = append(b, '/')
	b = strconv.AppendInt(b, n.Action.Size(), 10)
	if n.Instance != "" {
		b = append(b, '/')
		b = append(b, n.Instance...)
	}
	return b
}

// appendFlags writes s for SkipCacheLookup, p and a number for a Priority, and
// - for neither.
func (n Name) appendFlags(b []byte) []byte {
	start := len(b)
	if n.SkipCacheLookup {
		b = append(b, 's')
	}
	if n.Priority != 0 {
		b = append(b, 'p')
		b = strconv.AppendInt(b, int64(n.Priority), 10)
	}
	if len(b) == start {
		b = append(b, '-')
	}
	return b
}

// ParseName takes apart what String made. It accepts nothing that String does
// not make. The errors wrap ErrBadName.
func ParseName(s string) (Name, error) {
	n, err := parseName(s)
	if err == nil && n.String() != s {
		err = errors.New("it is not written in its shortest form")
	}
	if err != nil {
		return Name{}, fmt.Errorf("%w: %.300q: %w", ErrBadName, s, err)
	}
	return n, nil
}

// parseName is ParseName that tolerates other ways to write the same.
func parseName(s string) (Name, error) {
	rest, ok := strings.CutPrefix(s, prefix)
	if !ok {
		return Name{}, fmt.Errorf("it does not begin with %s", prefix)
	}
	if len(s) > maxNameBytes {
		return Name{}, fmt.Errorf("it is longer than %d bytes", maxNameBytes)
	}
	parts := strings.SplitN(rest, "/", 6)
	if len(parts) < 5 {
		return Name{}, errors.New("it has too few segments")
	}
	var n Name
	var err error
	if n.Created, n.Random, err = parseID(parts[0]); err != nil {
		return Name{}, err
	}
	if n.SkipCacheLookup, n.Priority, err = parseFlags(parts[1]); err != nil {
		return Name{}, err
	}
	if n.Action, err = parseDigest(parts[2], parts[3], parts[4]); err != nil {
		return Name{}, err
	}
	if len(parts) == 6 {
		n.Instance = parts[5]
	}
	if err := CheckInstance(n.Instance); err != nil {
		return Name{}, err
	}
	return n, nil
}

// CheckInstance says whether an instance name can be part of a Name.
func CheckInstance(instance string) error {
	if len(instance) > MaxInstanceBytes {
		return fmt.Errorf("the instance name has %d bytes, more than %d", len(instance), MaxInstanceBytes)
	}
	if strings.IndexByte(instance, 0) >= 0 {
		return errors.New("the instance name contains NUL")
	}
	return nil
}

// maxCreated is a time, in microseconds, at which nobody uses this any more. Far
// beyond it, timestamps can't be: one of a name becomes part of a result, and
// what clients make of a result that has another kind is their end.
const maxCreated = 253_370_764_800_000_000 // the year 9999

func parseID(s string) (created time.Time, random uint64, err error) {
	micros, rnd, ok := strings.Cut(s, ".")
	if !ok {
		return time.Time{}, 0, errors.New("its id has no dot")
	}
	us, err := strconv.ParseInt(micros, 36, 64)
	if err != nil {
		return time.Time{}, 0, fmt.Errorf("its time: %w", err)
	}
	if us < 0 || us > maxCreated {
		return time.Time{}, 0, errors.New("its time is none of ours")
	}
	if random, err = strconv.ParseUint(rnd, 36, 64); err != nil {
		return time.Time{}, 0, fmt.Errorf("its id: %w", err)
	}
	return time.UnixMicro(us), random, nil
}

func parseFlags(s string) (skip bool, priority int32, err error) {
	if s == "-" {
		return false, 0, nil
	}
	s, skip = strings.CutPrefix(s, "s")
	if s == "" {
		return skip, 0, nil
	}
	number, ok := strings.CutPrefix(s, "p")
	if !ok {
		return false, 0, errors.New("its flags are unknown")
	}
	p, err := strconv.ParseInt(number, 10, 32)
	if err != nil {
		return false, 0, fmt.Errorf("its priority: %w", err)
	}
	return skip, int32(p), nil
}

func parseDigest(function, hash, size string) (digest.Digest, error) {
	fn, ok := digest.FunctionNamed(function)
	if !ok {
		return digest.Digest{}, errors.New("its digest function is unknown")
	}
	n, err := digest.ParseSize(size)
	if err != nil {
		return digest.Digest{}, err
	}
	return digest.New(fn, hash, n)
}
