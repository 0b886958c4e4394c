package conform

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// Summary is how a server did.
type Summary struct {
	Passed, Skipped int
	// FailedMust and FailedShould are the cases that failed, by level.
	FailedMust, FailedShould int
}

// Summarize counts.
func Summarize(results []Result) Summary {
	var s Summary
	for _, r := range results {
		switch {
		case r.Outcome == Passed:
			s.Passed++
		case r.Outcome == Skipped:
			s.Skipped++
		case r.Case.Level == Should:
			s.FailedShould++
		default:
			s.FailedMust++
		}
	}
	return s
}

// String is a line for people.
func (s Summary) String() string {
	return fmt.Sprintf("%d passed, %d failed (%d MUST, %d SHOULD), %d skipped", s.Passed, s.FailedMust+s.FailedShould, s.FailedMust, s.FailedShould, s.Skipped)
}

// Report prints a table of all services, and then what failed, with the words of the
// specification and what the server did instead.
func Report(w io.Writer, results []Result) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "service\tpass\tfail\tskip\t")
	for _, service := range services(results) {
		var of []Result
		for _, r := range results {
			if serviceOf(r.Case.Name) == service {
				of = append(of, r)
			}
		}
		s := Summarize(of)
		fmt.Fprintf(tw, "%s\t%d\t%d\t%d\t\n", service, s.Passed, s.FailedMust+s.FailedShould, s.Skipped)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for _, r := range results {
		if r.Outcome != Failed {
			continue
		}
		fmt.Fprintf(w, "\n%s  %s (%s)\n  The specification: %s\n", r.Outcome, r.Case.Name, r.Case.Level, r.Case.Clause)
		for _, m := range r.Messages {
			fmt.Fprintf(w, "  The server: %s\n", m)
		}
	}
	_, err := fmt.Fprintf(w, "\n%s\n", Summarize(results))
	return err
}

func serviceOf(name string) string {
	service, _, _ := strings.Cut(name, "/")
	return service
}

// services are those of the results, in their order.
func services(results []Result) []string {
	var all []string
	for _, r := range results {
		if s := serviceOf(r.Case.Name); !slices.Contains(all, s) {
			all = append(all, s)
		}
	}
	return all
}

// record is a Result in JSON.
type record struct {
	Name     string   `json:"name"`
	Level    string   `json:"level"`
	Outcome  string   `json:"outcome"`
	Clause   string   `json:"clause"`
	Messages []string `json:"messages,omitempty"`
	Seconds  float64  `json:"seconds"`
}

// WriteJSON writes a line for each result.
func WriteJSON(w io.Writer, results []Result) error {
	enc := json.NewEncoder(w)
	for _, r := range results {
		if err := enc.Encode(record{r.Case.Name, r.Case.Level.String(), strings.ToLower(r.Outcome.String()), r.Case.Clause, r.Messages, r.Took.Seconds()}); err != nil {
			return err
		}
	}
	return nil
}
