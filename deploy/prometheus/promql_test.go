package prometheus_test

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// used is what a PromQL expression names.
type used struct {
	metrics []selected
	groups  []string // labels of by, without, on, ignoring, group_left and group_right
}

// selected is a metric with the matchers in its braces.
type selected struct {
	name     string
	matchers []matcher
}

type matcher struct{ label, value string }

//nolint:gochecknoglobals // immutable tables
var (
	// tokens are the words of PromQL: strings, ranges, numbers, names, and marks.
	tokens = regexp.MustCompile(`"(?:[^"\\]|\\.)*"|\[[0-9a-z:]+\]|[0-9.]+|[a-zA-Z_:][a-zA-Z0-9_:]*|=~|!~|!=|==|>=|<=|[-+*/%^(){},=<>]`)

	functions   = []string{"abs", "avg_over_time", "ceil", "clamp_max", "clamp_min", "histogram_quantile", "increase", "irate", "label_replace", "max_over_time", "min_over_time", "rate", "time", "vector"}
	aggregators = []string{"avg", "bottomk", "count", "max", "min", "sum", "topk"}
	grouping    = []string{"by", "without", "on", "ignoring", "group_left", "group_right"}
	operators   = []string{"and", "or", "unless", "bool", "offset"}
)

// parse finds what an expression names. It knows the words above, and no more of
// the grammar than that; a word that it does not know and that is called is an error.
func parse(expr string) (used, error) {
	var u used
	words := tokens.FindAllString(expr, -1)
	if rest := strings.TrimSpace(tokens.ReplaceAllString(expr, "")); rest != "" {
		return u, fmt.Errorf("unknown marks %q", rest)
	}
	depth := 0
	for i := 0; i < len(words); i++ {
		w := words[i]
		next := ""
		if i+1 < len(words) {
			next = words[i+1]
		}
		switch {
		case w == "(":
			depth++
		case w == ")":
			if depth--; depth < 0 {
				return u, fmt.Errorf("a ) too many")
			}
		case !isName(w), slices.Contains(operators, w):
		case slices.Contains(grouping, w) && next == "(":
			end := slices.Index(words[i:], ")")
			if end < 0 {
				return u, fmt.Errorf("%s( has no end", w)
			}
			for _, l := range words[i+2 : i+end] {
				if l != "," {
					u.groups = append(u.groups, l)
				}
			}
			i += end
		case next == "(" || slices.Contains(aggregators, w) && slices.Contains(grouping, next):
			if !slices.Contains(functions, w) && !slices.Contains(aggregators, w) {
				return u, fmt.Errorf("unknown function %s", w)
			}
		default:
			s := selected{name: w}
			if next == "{" {
				end := slices.Index(words[i:], "}")
				if end < 0 {
					return u, fmt.Errorf("%s{ has no end", w)
				}
				for m := range slices.Chunk(words[i+2:i+end], 4) {
					if len(m) < 3 || !isName(m[0]) || !strings.HasPrefix(m[2], `"`) || len(m) == 4 && m[3] != "," {
						return u, fmt.Errorf("%s has a matcher %q", w, m)
					}
					s.matchers = append(s.matchers, matcher{m[0], strings.Trim(m[2], `"`)})
				}
				i += end
			}
			u.metrics = append(u.metrics, s)
		}
	}
	if depth != 0 {
		return u, fmt.Errorf("%d ( too many", depth)
	}
	return u, nil
}

func isName(w string) bool { return regexp.MustCompile(`^[a-zA-Z_:]`).MatchString(w) }

func TestParse(t *testing.T) {
	for _, tc := range []struct {
		name, expr string
		want       used
		wrong      bool
	}{
		{name: "a name", expr: "x", want: used{metrics: []selected{{name: "x"}}}},
		{name: "matchers", expr: `x{a="1", b=~"2|3"} > 0.5`, want: used{metrics: []selected{{name: "x", matchers: []matcher{{"a", "1"}, {"b", "2|3"}}}}}},
		{
			name: "a function and groups", expr: `sum by (le, a) (rate(x_bucket{a!="}"}[5m])) / on (a) y unless z == 1`,
			want: used{metrics: []selected{{name: "x_bucket", matchers: []matcher{{"a", "}"}}}, {name: "y"}, {name: "z"}}, groups: []string{"le", "a", "a"}},
		},
		{name: "groups behind", expr: "max(x) by (a)", want: used{metrics: []selected{{name: "x"}}, groups: []string{"a"}}},
		{name: "an unknown function", expr: "rat(x[5m])", wrong: true},
		{name: "no end", expr: "sum(x", wrong: true},
		{name: "an end too many", expr: "sum(x))", wrong: true},
		{name: "braces without an end", expr: `x{a="1"`, wrong: true},
		{name: "no matcher", expr: `x{a}`, wrong: true},
		{name: "other marks", expr: "x & y", wrong: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := parse(tc.expr)
			if tc.wrong {
				if err == nil {
					t.Errorf("%+v, want an error", got)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tc.want, got, cmp.AllowUnexported(used{}, selected{}, matcher{})); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
}
