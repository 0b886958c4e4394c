//go:build linux

package hostile

import (
	"fmt"
	"strings"
)

// Table is all cases in Markdown, a table for each group.
func Table() string {
	var b strings.Builder
	for _, g := range Groups() {
		fmt.Fprintf(&b, "\n## %s\n\n| An action that |", g.Name)
		for w := range numWays {
			fmt.Fprintf(&b, " %v |", w)
		}
		b.WriteString("\n|---" + strings.Repeat("|---", int(numWays)) + "|\n")
		for _, c := range g.Cases {
			fmt.Fprintf(&b, "| %s |", c.Name)
			for _, o := range c.Want {
				fmt.Fprintf(&b, " %s |", o)
			}
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// String is the outcome in a few words.
func (o Outcome) String() string {
	switch o.Verdict {
	case Refused:
		return "refused"
	case Harmless:
		if o.Says != "" {
			return "not returned, the client is told"
		}
		return "harmless"
	case Possible:
		if len(o.Stays) > 0 {
			return "**possible**: the next action sees other " + strings.Join(o.Stays, ", ")
		}
		return "**possible**"
	case AsUser:
		return "as the machine lets its user"
	case Exits:
		return fmt.Sprintf("exit code %d", o.Code)
	case Fails:
		return "fails: " + codeName(o.Code)
	case Untried:
		return "**possible**, not tried"
	}
	return ""
}

func codeName(code int) string {
	switch code {
	case invalidArgument:
		return "INVALID_ARGUMENT"
	case resourceExhausted:
		return "RESOURCE_EXHAUSTED"
	case failedPrecondition:
		return "FAILED_PRECONDITION"
	case internal:
		return "INTERNAL, after another attempt by each worker that gets it"
	}
	return fmt.Sprint("code ", code)
}
