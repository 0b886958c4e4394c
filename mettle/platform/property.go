package platform

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// The names of properties that mean something here.
const (
	osFamily = "OSFamily"
	// ContainerImage is the one for the root file system that an action runs in. The
	// values "" and "none" are any worker's own.
	ContainerImage = "container-image"
	// Network is what of the network an action has: none unless it is ExternalNetwork.
	Network         = "network"
	ExternalNetwork = "external"
)

// AnyValue as the value of a pool's Property accepts every value.
const AnyValue = "*"

// What a worker or an operator may declare, at most. An honest one is far below.
const (
	maxProperties = 128
	maxNameBytes  = 256
	maxValueBytes = 1 << 10
)

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
	// Slots is how many actions one of its workers is expected to run at once, for
	// the time before any has told. 0: 1.
	Slots int
}

// ParsePool reads a pool as the --pools flag has it: NAME[/SLOTS][:name=value,...],
// such as gpu/8:gpu=yes,OSFamily=linux. A value has no comma.
func ParsePool(s string) (Pool, error) {
	head, props, some := strings.Cut(s, ":")
	name, slots, counted := strings.Cut(head, "/")
	p := Pool{Name: name}
	if err := checkName(name); err != nil {
		return Pool{}, fmt.Errorf("pool %q: %w", s, err)
	}
	if strings.ContainsAny(name, ",;= \t\n") {
		return Pool{}, fmt.Errorf("pool %q: %q is no name; a pool is NAME[/SLOTS][:name=value,...]", s, name)
	}
	if counted {
		n, err := strconv.Atoi(slots)
		if err != nil || n < 1 || n > maxSlots {
			return Pool{}, fmt.Errorf("pool %q: %q is not a number of slots, from 1 to %d", s, slots, maxSlots)
		}
		p.Slots = n
	}
	if !some {
		return p, nil
	}
	for part := range strings.SplitSeq(props, ",") {
		prop, err := ParseProperty(part)
		if err != nil {
			return Pool{}, fmt.Errorf("pool %q: %w", s, err)
		}
		p.Properties = append(p.Properties, prop)
	}
	if err := checkProperties(p.Properties); err != nil {
		return Pool{}, fmt.Errorf("pool %q: %w", s, err)
	}
	return p, nil
}

// checkName checks the name of a pool or a worker.
func checkName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("%w: it has no name", errNonsense)
	case len(name) > maxNameBytes || !utf8.ValidString(name):
		return fmt.Errorf("%w: the name %.40q is too long or not UTF-8", errNonsense, name)
	}
	return nil
}

// checkProperties checks what is declared.
func checkProperties(props []Property) error {
	if len(props) > maxProperties {
		return fmt.Errorf("%w: %d properties, at most %d are taken", errNonsense, len(props), maxProperties)
	}
	for _, p := range props {
		switch {
		case p.Name == "":
			return fmt.Errorf("%w: a property without a name", errNonsense)
		case len(p.Name) > maxNameBytes || len(p.Value) > maxValueBytes || !utf8.ValidString(p.Name) || !utf8.ValidString(p.Value):
			return fmt.Errorf("%w: property %.40q is too long or not UTF-8", errNonsense, p.Name)
		}
	}
	return nil
}

// sorted is props in the order of names and values, each once.
func sorted(props []Property) []Property {
	out := slices.Clone(props)
	slices.SortFunc(out, func(a, b Property) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.Value, b.Value))
	})
	return slices.Compact(out)
}
