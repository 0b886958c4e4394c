package pack

// Parsed is what Parse finds.
type Parsed = parsed

// ScanBytes returns the values of the records that a scan finds in data, which
// stands in a segment after its head.
func (s *Store) ScanBytes(data []byte) (values [][]byte) {
	for len(data) > 0 {
		p, ok := s.secret.parse(data)
		if !ok {
			data = data[min(s.secret.skip(data), int64(len(data))):]
			continue
		}
		values = append(values, p.Value)
		data = data[p.bytes:]
	}
	return values
}

// AppendRecord appends r as it would stand in a segment of s.
func (s *Store) AppendRecord(b []byte, r Record) []byte { return s.secret.appendRecord(b, &r, 1) }

// Segments counts the segments.
func (s *Store) Segments() int { return len(s.segs.all()) }

// Open counts the segments that are open.
func (s *Store) Open() int64 { return s.segs.open.Load() }

// MaxOpen is how many may be.
const MaxOpen = maxOpen

// SetSync replaces the fdatasync that comes before a segment is removed.
func (s *Store) SetSync(sync func(fd int) error) { s.fdatasync = sync }
