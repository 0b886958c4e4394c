package platform

import (
	"fmt"
	"slices"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
)

// offer is a pool as actions see it. It is immutable.
type offer struct {
	name  string
	props []Property // sorted, each once
}

// demands are the properties of want that not every worker has: without a
// container, and without a network, is how they all run.
func demands(want *repb.Platform) []*repb.Platform_Property {
	props := want.GetProperties()
	everywhere := func(pr *repb.Platform_Property) bool {
		switch pr.GetName() {
		case ContainerImage, Network:
			return pr.GetValue() == "" || pr.GetValue() == "none"
		}
		return isHint(pr.GetName())
	}
	if !slices.ContainsFunc(props, everywhere) {
		return props
	}
	return slices.DeleteFunc(slices.Clone(props), everywhere)
}

// isHint reports whether a property says how an action may be run faster, which each
// worker may do or leave: whether it is one for a tool that is kept running between
// actions. They are those of Bazel, and of the exec_properties that other servers read.
func isHint(name string) bool {
	switch name {
	case "persistentWorkerKey", "persistentWorkerProtocol", "persistentWorkerMultiplex", "persistentWorkerTool", "persistent-workers",
		"supports-workers", "supports-multiplex-workers", "supports-worker-cancellation", "supports-multiplex-sandboxing",
		"requires-worker-protocol", "worker-key-mnemonic", "recycle-runner":
		return true
	}
	return false
}

// has reports whether the pool's workers have one property.
func (o offer) has(pr *repb.Platform_Property) bool {
	return slices.ContainsFunc(o.props, func(p Property) bool { return p.meets(pr) })
}

// meets reports whether p is what an action asks for.
func (p Property) meets(pr *repb.Platform_Property) bool {
	switch {
	case p.Name != pr.GetName():
		return false
	case p.Value == AnyValue:
		return true
	case p.Name == osFamily:
		return strings.EqualFold(p.Value, pr.GetValue())
	}
	return p.Value == pr.GetValue()
}

// lacks lists which of props the pool's workers don't have.
func (o offer) lacks(props []*repb.Platform_Property) []*repb.Platform_Property {
	var out []*repb.Platform_Property
	for _, pr := range props {
		if !o.has(pr) {
			out = append(out, pr)
		}
	}
	return out
}

// surplus counts the properties that were not asked for: what would be wasted.
func (o offer) surplus(props []*repb.Platform_Property) int {
	n := 0
	for _, p := range o.props {
		if !slices.ContainsFunc(props, p.meets) {
			n++
		}
	}
	return n
}

// choose finds the pool that has all of props and the least beside it; the first
// of several. Nil: there is none.
func choose(offers []offer, props []*repb.Platform_Property) *offer {
	var best *offer
	least := 0
	for i := range offers {
		o := &offers[i]
		if slices.ContainsFunc(props, func(pr *repb.Platform_Property) bool { return !o.has(pr) }) {
			continue
		}
		if n := o.surplus(props); best == nil || n < least {
			best, least = o, n
		}
	}
	return best
}

// maxDemands bounds the properties that an action may ask for: they are compared
// with all of every pool's. It is more than a worker can have.
const maxDemands = 4 * maxProperties

// check refuses what no pool can make good.
func check(props []*repb.Platform_Property) error {
	if len(props) > maxDemands {
		return fmt.Errorf("%w: %d properties, at most %d can be asked for", ErrImpossible, len(props), maxDemands)
	}
	family := ""
	for _, pr := range props {
		switch name, value := pr.GetName(), pr.GetValue(); name {
		case "":
			return fmt.Errorf("%w: a property without a name, of value %.100q", ErrImpossible, value)
		case osFamily:
			if family != "" && !strings.EqualFold(family, value) {
				return fmt.Errorf("%w: property %s has the values %.100q and %.100q, but takes one", ErrImpossible, name, family, value)
			}
			family = value
		}
	}
	return nil
}

// refuse says which of the properties is the trouble, what would be accepted, and
// which pool comes nearest.
func refuse(offers []offer, props []*repb.Platform_Property) error {
	if len(offers) == 0 {
		what := "nothing in particular"
		if len(props) > 0 {
			what = list(texts(props))
		}
		return fmt.Errorf("%w: there are no workers and none are expected; asked for is %s", ErrUnsupported, what)
	}
	return fmt.Errorf("%w: %s%s", ErrUnsupported, trouble(offers, props), nearest(offers, props))
}

// trouble names a property that cannot be had.
func trouble(offers []offer, props []*repb.Platform_Property) string {
	for _, pr := range props {
		if slices.ContainsFunc(offers, func(o offer) bool { return o.has(pr) }) {
			continue
		}
		asked := fmt.Sprintf("property %.100q of value %.200q", pr.GetName(), pr.GetValue())
		if values := valuesOf(offers, pr.GetName()); len(values) > 0 {
			return fmt.Sprintf("%s: accepted are %s", asked, list(values))
		}
		if pr.GetName() == ContainerImage {
			return asked + `: workers run no container images here, accepted are "none" and ""`
		}
		if pr.GetName() == Network {
			return asked + `: no worker gives actions its network (--allow_network of mettle dual and mettle worker), accepted are "none" and ""`
		}
		return fmt.Sprintf("%s: no worker declares that property, accepted are %s", asked, list(namesOf(offers)))
	}
	return "workers have each of the properties asked for, but none has all of " + list(texts(props))
}

// nearest names the pool that lacks the least, where there are several pools.
func nearest(offers []offer, props []*repb.Platform_Property) string {
	if len(offers) < 2 {
		return ""
	}
	best, lacking := offers[0], offers[0].lacks(props)
	for _, o := range offers[1:] {
		if l := o.lacks(props); len(l) < len(lacking) {
			best, lacking = o, l
		}
	}
	return fmt.Sprintf("; the nearest pool, %.100q, lacks %s", best.name, list(texts(lacking)))
}

// maxListed bounds what a message lists: clients' headers take 8 KiB.
const maxListed = 10

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

func texts(props []*repb.Platform_Property) []string {
	out := make([]string, len(props))
	for i, pr := range props {
		out[i] = fmt.Sprintf("%.50s=%.50s", pr.GetName(), pr.GetValue())
	}
	return out
}

// valuesOf lists the values that some pool has for a name, sorted.
func valuesOf(offers []offer, name string) []string {
	var out []string
	for _, o := range offers {
		for _, p := range o.props {
			if p.Name == name {
				out = append(out, fmt.Sprintf("%.50s", p.Value))
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// namesOf lists the names of the properties that some pool has, sorted.
func namesOf(offers []offer) []string {
	var out []string
	for _, o := range offers {
		for _, p := range o.props {
			out = append(out, fmt.Sprintf("%.50s", p.Name))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
