package wire

// A server that does not have a log stream, and can tell from its name that another
// one may, says so by this trailer. Who can reach others asks them.
const (
	LogStreamTrailer   = "elan-log-stream"
	LogStreamElsewhere = "elsewhere"
)

// LogStreamAttempts is how often it is asked for in all. Calls take turns with the
// servers, of which there are some, but other calls come between: of four servers
// each is asked with a probability of 99.99%.
const LogStreamAttempts = 32
