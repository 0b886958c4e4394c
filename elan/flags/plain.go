package flags

import (
	"io"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Plain is text of others as a terminal may have it: what is not to be printed, but the
// ends of lines and tabs, would be commands to the terminal, and is escaped.
func Plain(s string) string {
	if utf8.ValidString(s) && !strings.ContainsFunc(s, moves) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if moves(r) {
			quoted := strconv.QuoteRuneToASCII(r)
			b.WriteString(quoted[1 : len(quoted)-1])
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}

func moves(r rune) bool { return r != '\n' && r != '\t' && !unicode.IsPrint(r) }

// PlainWriter passes on to w what is written, as Plain has it. Each write is a whole text.
func PlainWriter(w io.Writer) io.Writer { return plainWriter{w} }

type plainWriter struct{ w io.Writer }

// Write implements io.Writer.
func (p plainWriter) Write(b []byte) (int, error) {
	if _, err := io.WriteString(p.w, Plain(string(b))); err != nil {
		return 0, err
	}
	return len(b), nil
}
