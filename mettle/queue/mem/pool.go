package mem

// A pool is the jobs that wait for a worker, or the workers that wait for a job.
// At any time only one of the two is not empty. All of it is guarded by
// Queue.mu.
type pool struct {
	// bands are those that have jobs, byPriority the same.
	bands      heap[*band]
	byPriority map[int32]*band
	// shares are those of the invocations that have jobs, waiting or leased.
	shares map[string]*share

	idle []*waiter // the one that waits the shortest is last
	dead int       // how many of idle wait no more
}

// A band is the jobs of one priority that wait.
type band struct {
	priority int32
	lines    heap[*line]
	index    int
}

// A line is the jobs of one invocation and priority that wait.
type line struct {
	share *share
	band  *band
	jobs  heap[*job]
	index int
}

// A share is what one invocation has of a pool.
type share struct {
	invocation string
	running    int     // how many jobs are leased
	turn       uint64  // when it last got a worker, or else came; see Queue.turns
	lines      []*line // one a priority, at most maxLines
}

func newPool() *pool {
	return &pool{byPriority: make(map[int32]*band), shares: make(map[string]*share)}
}

func (b *band) before(c *band) bool { return b.priority < c.priority }
func (b *band) place() *int         { return &b.index }

// before says whose turn it is: who has the fewest workers, and of those who
// has waited the longest for one.
func (l *line) before(m *line) bool {
	if l.share.running != m.share.running {
		return l.share.running < m.share.running
	}
	return l.share.turn < m.share.turn
}

func (l *line) place() *int { return &l.index }

// first is the line whose turn it is, or nil.
func (p *pool) first() *line {
	if len(p.bands) == 0 {
		return nil
	}
	return p.bands[0].lines[0]
}

// share finds or makes the share of an invocation, whose turn comes after
// everybody's who is there already.
func (p *pool) share(invocation string, turns *uint64) *share {
	s := p.shares[invocation]
	if s == nil {
		*turns++
		s = &share{invocation: invocation, turn: *turns}
		p.shares[invocation] = s
	}
	return s
}

// maxLines bounds share.lines, all of which are looked at when a worker comes or
// goes. Past it a job waits at the priority nearest to its own of those that its
// invocation has: one that uses a number for each job is served roughly in their
// order, and holds up nobody else.
const maxLines = 64

// line is the line of s in which jobs of a priority wait; nil where there is none.
func (s *share) line(priority int32) *line {
	var nearest *line
	var least int64
	for _, l := range s.lines {
		d := max(int64(l.band.priority)-int64(priority), int64(priority)-int64(l.band.priority))
		if d == 0 {
			return l
		}
		if nearest == nil || d < least {
			nearest, least = l, d
		}
	}
	if len(s.lines) < maxLines {
		return nil
	}
	return nearest
}

// add has j wait in the line of s.
func (p *pool) add(j *job, s *share) {
	p.shares[s.invocation] = s // it may have been forgotten just now
	l := s.line(j.priority)
	if l == nil {
		b := p.byPriority[j.priority]
		if b == nil {
			b = &band{priority: j.priority}
			p.byPriority[j.priority] = b
			p.bands.push(b)
		}
		l = &line{share: s, band: b}
		s.lines = append(s.lines, l)
		b.lines.push(l)
	}
	j.line = l
	l.jobs.push(j)
}

// remove has j, which waits, wait no more.
func (p *pool) remove(j *job) {
	l := j.line
	j.line = nil
	l.jobs.remove(j)
	if len(l.jobs) > 0 {
		return
	}
	b, s := l.band, l.share
	b.lines.remove(l)
	if len(b.lines) == 0 {
		p.bands.remove(b)
		delete(p.byPriority, b.priority)
	}
	for i, other := range s.lines {
		if other == l {
			last := len(s.lines) - 1
			s.lines[i], s.lines[last] = s.lines[last], nil
			s.lines = s.lines[:last]
			break
		}
	}
	p.tidy(s)
}

// began notes that s has got a worker, at that turn.
func (p *pool) began(s *share, turn uint64) {
	s.running++
	s.turn = turn
	s.moved()
}

// ended notes that a worker of s has become free.
func (p *pool) ended(s *share) {
	s.running--
	s.moved()
	p.tidy(s)
}

// moved puts the lines of s where they belong now.
func (s *share) moved() {
	for _, l := range s.lines {
		l.band.lines.moved(l)
	}
}

// tidy forgets a share that has nothing.
func (p *pool) tidy(s *share) {
	if s.running == 0 && len(s.lines) == 0 {
		delete(p.shares, s.invocation)
	}
}

// waits has w wait for a job, as the first who gets one.
func (p *pool) waits(w *waiter) { p.idle = append(p.idle, w) }

// waiter takes out the waiter that has waited the shortest; nil if there is none.
func (p *pool) waiter() *waiter {
	for len(p.idle) > 0 {
		last := len(p.idle) - 1
		w := p.idle[last]
		p.idle[last] = nil
		p.idle = p.idle[:last]
		if !w.gone {
			return w
		}
		p.dead--
	}
	return nil
}

// left notes that one waiter of idle is gone, and makes room now and then.
func (p *pool) left() {
	p.dead++
	if p.dead <= len(p.idle)/2 {
		return
	}
	alive := p.idle[:0]
	for _, w := range p.idle {
		if !w.gone {
			alive = append(alive, w)
		}
	}
	clear(p.idle[len(alive):])
	p.idle, p.dead = alive, 0
}
