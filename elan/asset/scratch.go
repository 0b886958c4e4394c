package asset

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
)

// scratch is the directory for what is being fetched. It is safe for concurrent use.
type scratch struct {
	mu   sync.Mutex // guards path
	path string     // empty until it is needed, where it is temporary
	temp bool
}

// newScratch makes dir, or empties it: a process that was killed leaves its files
// there. An empty name is that of a temporary directory, which most servers do
// without: small files stay in memory.
func newScratch(dir string) (*scratch, error) {
	if dir == "" {
		return &scratch{temp: true}, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	old, err := os.ReadDir(dir)
	for _, e := range old {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return &scratch{path: dir}, err
}

// get returns the directory's path.
func (s *scratch) get() (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	if s.path == "" {
		s.path, err = os.MkdirTemp("", "elan-assets-")
	}
	return s.path, err
}

// close removes the directory if it is temporary.
func (s *scratch) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.temp || s.path == "" {
		return nil
	}
	return os.RemoveAll(s.path)
}
