package resource

import "strings"

// A LogStreamName is the name of a log stream, for readers; with a Token it is the
// one for its writer, which readers are not told. The forms are
//
//	{parent/}logstreams/{id}
//	{parent/}logstreams/{id}/{token}
type LogStreamName struct {
	// Parent is the instance name, which may be empty.
	Parent string
	// ID and Token are of letters, digits and hyphens, at most MaxLogStreamPart bytes.
	ID, Token string
}

// MaxLogStreamPart bounds the ID and the Token of a log stream, in bytes.
const MaxLogStreamPart = 64

const logStreams = "logstreams/"

// ParseLogStream parses the name of a log stream, and reports whether s is one:
// every other name is for ParseRead and ParseWrite to judge. It allocates nothing.
func ParseLogStream(s string) (n LogStreamName, ok bool) {
	// Names of blobs are told by the fast one of both searches.
	if len(s) > MaxLen || !strings.Contains(s, logStreams) {
		return LogStreamName{}, false
	}
	i := strings.LastIndex(s, logStreams)
	if i < 0 || i == 1 || i > 1 && s[i-1] != '/' {
		return LogStreamName{}, false
	}
	n.Parent = instance(s, i)
	var writer bool
	n.ID, n.Token, writer = strings.Cut(s[i+len(logStreams):], "/")
	if !logStreamPart(n.ID) || writer && !logStreamPart(n.Token) || CheckInstance(n.Parent) != nil {
		return LogStreamName{}, false
	}
	return n, true
}

func logStreamPart(s string) bool {
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return s != "" && len(s) <= MaxLogStreamPart
}

// String formats n.
func (n LogStreamName) String() string {
	s := logStreams + n.ID
	if n.Parent != "" {
		s = n.Parent + "/" + s
	}
	if n.Token != "" {
		s += "/" + n.Token
	}
	return s
}
