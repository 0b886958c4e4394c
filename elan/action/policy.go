package action

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// Updates decides who may set results from outside, by UpdateActionResult. What
// executes actions in the same process calls Put and asks nobody. Implementations
// are safe for concurrent use.
type Updates interface {
	// MayUpdate returns nil where the caller, of whom ctx tells, may set results
	// of an instance. Otherwise the error wraps ErrForbidden, and says why.
	// Capabilities ask it too, so that they tell each caller the truth.
	MayUpdate(ctx context.Context, instance string) error
}

// UpdatePolicy is Updates by instance alone, whoever calls. The zero UpdatePolicy
// lets everyone update. It is immutable.
type UpdatePolicy struct {
	restricted bool
	instances  []string // that may be updated, where it is restricted
}

var _ Updates = UpdatePolicy{}

// The forms of an UpdatePolicy as text.
const (
	everyone       = "everyone"
	nobody         = "nobody"
	instancePrefix = "instances:"
)

// UnmarshalText reads what String writes: everyone, nobody, or instances: and
// their names with commas between them, as in instances:main,ci.
func (p *UpdatePolicy) UnmarshalText(text []byte) error {
	s := string(text)
	list, some := strings.CutPrefix(s, instancePrefix)
	switch {
	case s == everyone:
		*p = UpdatePolicy{}
	case s == nobody:
		*p = UpdatePolicy{restricted: true}
	case some:
		*p = UpdatePolicy{restricted: true, instances: strings.Split(list, ",")}
	default:
		return fmt.Errorf("%q is none of %s, %s and %sNAME,NAME", s, everyone, nobody, instancePrefix)
	}
	return nil
}

// String is the policy as text.
func (p UpdatePolicy) String() string {
	switch {
	case !p.restricted:
		return everyone
	case p.instances == nil:
		return nobody
	}
	return instancePrefix + strings.Join(p.instances, ",")
}

// MayUpdate implements Updates.
func (p UpdatePolicy) MayUpdate(_ context.Context, instance string) error {
	if !p.restricted || slices.Contains(p.instances, instance) {
		return nil
	}
	if p.instances == nil {
		return fmt.Errorf("%w: on this server results come from executing actions here, and clients may only read them", ErrForbidden)
	}
	return fmt.Errorf("%w: clients may not set those of instance %q, but those of %q", ErrForbidden, instance, p.instances)
}
