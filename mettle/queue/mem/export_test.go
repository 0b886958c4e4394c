package mem

// Bands counts the priorities at which jobs of a pool wait.
func Bands(q *Queue, pool string) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.pools[pool].bands)
}
