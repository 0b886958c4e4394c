// Package platform turns the platform properties of an action into the name of
// the pool whose workers may run it, or into a refusal that names the property
// and says what would be accepted. Nothing waits in a queue that nobody serves.
//
// The properties are those of the REAPI's lexicon (platform.md, in its
// repository): OSFamily takes one value, in any case; ISA may be given several
// times, and a worker must have them all; likewise any property that the
// operator has declared. container-image is refused unless it is empty or
// "none", because workers run on their own system. Names, and the values of all
// properties but OSFamily, are compared exactly.
//
// mettle/api, its caller, decides whether the Action's or the Command's platform counts.
package platform

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/mettle/queue"
)

// ErrUnsupported is wrapped by the errors of Match.
var ErrUnsupported = errors.New("unsupported platform")

// The names of properties that mean something here.
const (
	osFamily       = "OSFamily"
	containerImage = "container-image"
)

// AnyValue as the value of a pool's Property accepts every value.
const AnyValue = "*"

// Property is a name and one of its values.
type Property struct{ Name, Value string }

// String is the form of the --platform flag: name=value.
func (p Property) String() string { return p.Name + "=" + p.Value }

// ParseProperty reads name=value.
func ParseProperty(s string) (Property, error) {
	name, value, ok := strings.Cut(s, "=")
	if !ok || name == "" {
		return Property{}, fmt.Errorf("platform property %q is not of the form name=value", s)
	}
	return Property{Name: name, Value: value}, nil
}

// Pool is a set of workers that are alike.
type Pool struct {
	// Name is the name by which the queue knows it.
	Name string
	// Properties are all that the pool's workers have. A name may occur several times.
	Properties []Property
}

// Options are the settings of a Set.
type Options struct {
	// Pools are those with workers. The first that has all that an action asks
	// for gets it, so the first is the default. Default: one pool,
	// queue.DefaultPool, of workers like this machine: see Host.
	Pools []Pool
	// Properties are added to every pool: what the operator declares.
	Properties map[string]string
}

// Set knows the pools. It is immutable and safe for concurrent use.
type Set struct {
	pools []pool
}

type pool struct {
	name   string
	values map[string][]string // by property
}

// New checks the options and makes a Set.
func New(o Options) (*Set, error) {
	if len(o.Pools) == 0 {
		o.Pools = []Pool{{Name: queue.DefaultPool, Properties: Host()}}
	}
	p := &Set{}
	for _, in := range o.Pools {
		if slices.ContainsFunc(p.pools, func(q pool) bool { return q.name == in.Name }) {
			return nil, fmt.Errorf("platform: there are two pools %q", in.Name)
		}
		out := pool{name: in.Name, values: make(map[string][]string)}
		props := slices.Clone(in.Properties)
		for name, value := range o.Properties {
			props = append(props, Property{name, value})
		}
		for _, prop := range props {
			if prop.Name == "" {
				return nil, fmt.Errorf("platform: pool %q has a property without a name", in.Name)
			}
			if !slices.Contains(out.values[prop.Name], prop.Value) {
				out.values[prop.Name] = append(out.values[prop.Name], prop.Value)
			}
		}
		p.pools = append(p.pools, out)
	}
	return p, nil
}

// Names lists the names of the pools, the default one first.
func (p *Set) Names() []string {
	names := make([]string, len(p.pools))
	for i, q := range p.pools {
		names[i] = q.name
	}
	return names
}

// Match finds the pool for an action that asks for the given properties, which
// may be nil. The error wraps ErrUnsupported and names a property that cannot be had.
func (p *Set) Match(want *repb.Platform) (string, error) {
	props := want.GetProperties()
	if len(props) == 0 {
		return p.pools[0].name, nil
	}
	if err := check(props); err != nil {
		return "", err
	}
	for _, q := range p.pools {
		if !slices.ContainsFunc(props, func(pr *repb.Platform_Property) bool { return !q.has(pr) }) {
			return q.name, nil
		}
	}
	return "", p.refuse(props)
}

// check refuses what no pool can make good.
func check(props []*repb.Platform_Property) error {
	family := ""
	for _, pr := range props {
		switch name, value := pr.GetName(), pr.GetValue(); name {
		case "":
			return fmt.Errorf("%w: a property without a name, of value %.100q", ErrUnsupported, value)
		case osFamily:
			if family != "" && !strings.EqualFold(family, value) {
				return fmt.Errorf("%w: property %s has the values %.100q and %.100q, but takes one", ErrUnsupported, name, family, value)
			}
			family = value
		}
	}
	return nil
}

// has reports whether the pool's workers have one property.
func (q pool) has(pr *repb.Platform_Property) bool {
	name, value := pr.GetName(), pr.GetValue()
	values := q.values[name]
	if name == containerImage && (value == "" || value == "none") {
		return true
	}
	if name == osFamily {
		return slices.ContainsFunc(values, func(v string) bool { return strings.EqualFold(v, value) }) || slices.Contains(values, AnyValue)
	}
	return slices.Contains(values, value) || slices.Contains(values, AnyValue)
}

// refuse says which of the properties is the trouble.
func (p *Set) refuse(props []*repb.Platform_Property) error {
	for _, pr := range props {
		if slices.ContainsFunc(p.pools, func(q pool) bool { return q.has(pr) }) {
			continue
		}
		asked := fmt.Sprintf("%.100q of value %.200q", pr.GetName(), pr.GetValue())
		if pr.GetName() == containerImage {
			return fmt.Errorf("%w: property %s: workers run no containers, accepted are \"none\" and \"\"", ErrUnsupported, asked)
		}
		if values := p.values(pr.GetName()); len(values) > 0 {
			return fmt.Errorf("%w: property %s: accepted are %s", ErrUnsupported, asked, list(values))
		}
		return fmt.Errorf("%w: property %s: no worker declares that property, accepted are %s", ErrUnsupported, asked, list(p.names()))
	}
	return fmt.Errorf("%w: workers have each of the properties asked for, but none has all of %s", ErrUnsupported, list(asked(props)))
}

// maxListed bounds what a message lists.
const maxListed = 20

func list(ss []string) string {
	if len(ss) == 0 {
		return "none"
	}
	more := ""
	if len(ss) > maxListed {
		more = fmt.Sprintf(" and %d more", len(ss)-maxListed)
		ss = ss[:maxListed]
	}
	return strings.Join(ss, ", ") + more
}

func asked(props []*repb.Platform_Property) []string {
	out := make([]string, len(props))
	for i, pr := range props {
		out[i] = fmt.Sprintf("%.100s=%.200s", pr.GetName(), pr.GetValue())
	}
	return out
}

// values lists the values that some pool has for a name, sorted.
func (p *Set) values(name string) []string {
	var out []string
	for _, q := range p.pools {
		out = append(out, q.values[name]...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// names lists the names of the properties that some pool has, sorted.
func (p *Set) names() []string {
	var out []string
	for _, q := range p.pools {
		for name := range q.values {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Host returns the properties of the machine that this program runs on, as far
// as the lexicon has words for them.
func Host() []Property {
	return host(runtime.GOOS, runtime.GOARCH)
}

func host(goos, goarch string) []Property {
	family := goos
	switch goos {
	case "darwin":
		family = "macos"
	case "solaris", "illumos":
		family = "sunos"
	}
	props := []Property{{osFamily, family}, {"Arch", goarch}}
	isa := map[string][]string{
		"386":     {"x86-32"},
		"amd64":   {"x86-64"},
		"arm":     {"arm-a32"},
		"arm64":   {"arm-a64", "armv8"},
		"loong64": {"la64v100"},
		"ppc64":   {"power-isa-be"},
		"ppc64le": {"power-isa-le"},
		"riscv64": {"rv64g"},
		"sparc64": {"sparc-v9"},
	}
	for _, v := range isa[goarch] {
		props = append(props, Property{"ISA", v})
	}
	return props
}
