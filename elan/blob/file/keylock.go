package file

import (
	"hash/maphash"
	"sync"
)

// keyLocks are locks of paths. Whoever removes a file, or depends on one not
// being removed between looking at it and marking it as used, holds the lock of
// its path. The common case needs none: a file that was marked lately is not
// removed (see Store.use). It is ready for use after init.
type keyLocks struct {
	seed   maphash.Seed
	shards [64]keyShard
}

type keyShard struct {
	mu sync.Mutex
	// held has, for each locked path, a channel that is closed when it is unlocked.
	held map[string]chan struct{}
}

func (k *keyLocks) init() {
	k.seed = maphash.MakeSeed()
	for i := range k.shards {
		k.shards[i].held = make(map[string]chan struct{})
	}
}

func (k *keyLocks) shard(path string) *keyShard {
	return &k.shards[maphash.String(k.seed, path)%uint64(len(k.shards))]
}

// lock waits for the lock of path, or until done is closed. It reports whether
// it has it.
func (k *keyLocks) lock(done <-chan struct{}, path string) bool {
	sh := k.shard(path)
	for {
		sh.mu.Lock()
		free, held := sh.held[path]
		if !held {
			sh.held[path] = make(chan struct{})
			sh.mu.Unlock()
			return true
		}
		sh.mu.Unlock()
		select {
		case <-free:
		case <-done:
			return false
		}
	}
}

// tryLock takes the lock of path if nobody has it.
func (k *keyLocks) tryLock(path string) bool {
	sh := k.shard(path)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if _, held := sh.held[path]; held {
		return false
	}
	sh.held[path] = make(chan struct{})
	return true
}

func (k *keyLocks) unlock(path string) {
	sh := k.shard(path)
	sh.mu.Lock()
	free := sh.held[path]
	delete(sh.held, path)
	sh.mu.Unlock()
	close(free)
}
