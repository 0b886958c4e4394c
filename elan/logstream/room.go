package logstream

// reserve makes room for n bytes more, and reports whether there is.
func (s *Streams) reserve(n int64) bool {
	var dropped []*stream
	s.mu.Lock()
	s.bytes += n
	for s.bytes > s.o.MaxBytes {
		st := s.oldest()
		if st == nil {
			break
		}
		dropped = append(dropped, st)
	}
	ok := s.bytes <= s.o.MaxBytes
	if !ok {
		s.bytes -= n
	}
	s.mu.Unlock()
	for _, st := range dropped {
		st.drop()
	}
	return ok
}

// release takes back what was reserved in vain.
func (s *Streams) release(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bytes -= n
}

// oldest takes the one out that ended first, which the caller drops; nil if none
// has ended. The caller has mu.
func (s *Streams) oldest() *stream {
	e := s.ended.Front()
	if e == nil {
		return nil
	}
	st := e.Value.(*stream) //nolint:forcetypeassert // all are
	s.forget(st)
	return st
}

// forget takes one out that has ended, if it is in. The caller has mu.
func (s *Streams) forget(st *stream) bool {
	if s.byID[st.name.ID] != st {
		return false
	}
	delete(s.byID, st.name.ID)
	s.ended.Remove(st.place)
	s.bytes -= st.length()
	return true
}

// end ends a stream: finished, or for the reason err. Only the first end counts.
func (s *Streams) end(st *stream, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endLocked(st, err)
}

// endLocked is end for a caller that has mu.
func (s *Streams) endLocked(st *stream, err error) {
	if s.byID[st.name.ID] != st {
		return // it made room for others, or the server shuts down
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.ended {
		return
	}
	st.ended, st.err = true, err
	if s.open[st.owner]--; s.open[st.owner] <= 0 {
		delete(s.open, st.owner)
	}
	st.place = s.ended.PushBack(st)
	st.timer.Reset(s.o.Keep)
	st.tell()
	s.metrics.count(err)
}

// timeout is called when a stream may have outlived itself, or its writer.
func (s *Streams) timeout(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ended, left := st.left(s.o.WriterTimeout)
	switch {
	case ended:
		if s.forget(st) {
			st.drop()
		}
	case left > 0:
		st.timer.Reset(left)
	default:
		s.endLocked(st, ErrAborted)
	}
}
