package flags_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/mettle-build/mettle/elan/flags"
)

// TestPlain: no server and no client of one has a word with the terminal of who looks.
func TestPlain(t *testing.T) {
	for in, want := range map[string]string{
		"":                          "",
		"release/1 → grün\tx\nnext": "release/1 → grün\tx\nnext",
		"\x1b]0;title\x07\x1b[2J":   `\x1b]0;title\a\x1b[2J`,
		"\u009b2J\r\u202ex":         `\u009b2J\r\u202ex`,
		"a\xffb":                    "a\uFFFDb",
	} {
		var b bytes.Buffer
		if n, err := fmt.Fprint(flags.PlainWriter(&b), in); err != nil || n != len(in) || b.String() != want {
			t.Errorf("%q is %q after %d bytes, %v; want %q", in, b.String(), n, err, want)
		}
	}
}
