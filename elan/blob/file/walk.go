package file

import (
	"errors"
	"io"
	"os"
	"strconv"

	"github.com/mettle-build/mettle/elan/digest"
)

// errEnough ends a walk early.
var errEnough = errors.New("enough")

// folder is one of the folders that hold blobs or entries.
type folder struct {
	path string // with a slash at its end
	fn   digest.Function
	cas  bool
}

// walk calls visit with the name of each file of blobs and entries, until visit
// fails, or the store is closed (errGivenUp). Files that come and go meanwhile
// may be seen or not.
func (s *Store) walk(visit func(f folder, name string) error) error {
	if err := s.walkTop(s.casDir, true, visit); err != nil {
		return err
	}
	return s.walkTop(s.acDir, false, visit)
}

func (s *Store) walkTop(top string, cas bool, visit func(f folder, name string) error) error {
	for _, fn := range digest.Functions() {
		if !s.prepared[fn].Load() {
			continue
		}
		for i := range fanOut {
			if err := s.walkFolder(folderOf(top, cas, fn, i), visit); err != nil {
				return err
			}
		}
	}
	return nil
}

// folderOf is the i-th folder of a digest function.
func folderOf(top string, cas bool, fn digest.Function, i int) folder {
	hex := strconv.FormatInt(int64(i|0x100), 16)[1:]
	return folder{path: top + fn.String() + "/" + hex + "/", fn: fn, cas: cas}
}

// walkFolder reads names in portions, so that a large folder takes little memory.
func (s *Store) walkFolder(f folder, visit func(f folder, name string) error) error {
	select {
	case <-s.closing:
		return errGivenUp
	default:
	}
	dir, err := os.Open(f.path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	defer dir.Close() //nolint:errcheck // opened for reading
	for {
		names, err := dir.Readdirnames(1024)
		for _, name := range names {
			if err := visit(f, name); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
