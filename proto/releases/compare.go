package releases

import (
	"fmt"
	"iter"

	"google.golang.org/protobuf/reflect/protoreflect"
)

// A container has messages and enums: a file, or a message.
type container interface {
	Messages() protoreflect.MessageDescriptors
	Enums() protoreflect.EnumDescriptors
}

// Broken compares a file with what it was in a release, and says of each thing in
// which a process of that release would not understand one of today, or the
// reverse: what is gone, and what has another number, name or type. New fields,
// messages, values and methods break nothing, nor does a field that is gone and
// whose number and name are reserved.
func Broken(was, is protoreflect.FileDescriptor) []string {
	c := &comparison{}
	if was.Package() != is.Package() {
		c.add("the package was %s, and is %s", was.Package(), is.Package())
		return c.broken
	}
	c.container(was, is)
	for s := range all[protoreflect.ServiceDescriptor](was.Services()) {
		c.service(s, is.Services().ByName(s.Name()))
	}
	return c.broken
}

type comparison struct{ broken []string }

func (c *comparison) add(format string, args ...any) {
	c.broken = append(c.broken, fmt.Sprintf(format, args...))
}

// list is one of protoreflect's.
type list[D any] interface {
	Len() int
	Get(i int) D
}

func all[D any](l list[D]) iter.Seq[D] {
	return func(yield func(D) bool) {
		for i := range l.Len() {
			if !yield(l.Get(i)) {
				return
			}
		}
	}
}

func (c *comparison) container(was, is container) {
	for m := range all[protoreflect.MessageDescriptor](was.Messages()) {
		if now := is.Messages().ByName(m.Name()); now != nil {
			c.message(m, now)
		} else {
			c.add("the message %s is gone", m.FullName())
		}
	}
	for e := range all[protoreflect.EnumDescriptor](was.Enums()) {
		if now := is.Enums().ByName(e.Name()); now != nil {
			c.enum(e, now)
		} else {
			c.add("the enum %s is gone", e.FullName())
		}
	}
}

func (c *comparison) message(was, is protoreflect.MessageDescriptor) {
	c.container(was, is)
	for f := range all[protoreflect.FieldDescriptor](was.Fields()) {
		now := is.Fields().ByNumber(f.Number())
		switch {
		case now != nil:
			c.field(f, now)
		case !is.ReservedRanges().Has(f.Number()) || !is.ReservedNames().Has(f.Name()):
			c.add("%s is gone, and its number %d and its name are not both reserved", f.FullName(), f.Number())
		}
	}
	// What was reserved stays so: it may be on the wire still.
	for i := range was.ReservedRanges().Len() {
		r := was.ReservedRanges().Get(i)
		for n := r[0]; n < r[1]; n++ {
			if !is.ReservedRanges().Has(n) {
				c.add("number %d of %s is not reserved any more", n, was.FullName())
			}
		}
	}
}

func (c *comparison) field(was, is protoreflect.FieldDescriptor) {
	if a, b := shape(was), shape(is); a != b {
		c.add("%s, number %d, was %s, and is %s", was.FullName(), was.Number(), a, b)
	}
}

// shape is all of a field, but for its number, that others depend on.
func shape(f protoreflect.FieldDescriptor) string {
	s := fmt.Sprintf("%s %s %s", f.Cardinality(), f.Kind(), f.Name())
	switch {
	case f.Message() != nil:
		s += " of " + string(f.Message().FullName())
	case f.Enum() != nil:
		s += " of " + string(f.Enum().FullName())
	}
	if f.HasPresence() {
		s += ", with presence"
	}
	if f.IsPacked() {
		s += ", packed"
	}
	if o := f.ContainingOneof(); o != nil && !o.IsSynthetic() {
		s += ", in the oneof " + string(o.Name())
	}
	return s
}

func (c *comparison) enum(was, is protoreflect.EnumDescriptor) {
	for v := range all[protoreflect.EnumValueDescriptor](was.Values()) {
		switch now := is.Values().ByNumber(v.Number()); {
		case now != nil && now.Name() != v.Name():
			c.add("%s, number %d, is %s", v.FullName(), v.Number(), now.Name())
		case now == nil && (!is.ReservedRanges().Has(v.Number()) || !is.ReservedNames().Has(v.Name())):
			c.add("%s is gone, and its number %d and its name are not both reserved", v.FullName(), v.Number())
		}
	}
}

func (c *comparison) service(was, is protoreflect.ServiceDescriptor) {
	if is == nil {
		c.add("the service %s is gone", was.FullName())
		return
	}
	for m := range all[protoreflect.MethodDescriptor](was.Methods()) {
		now := is.Methods().ByName(m.Name())
		switch {
		case now == nil:
			c.add("the method %s is gone", m.FullName())
		case signature(now) != signature(m):
			c.add("%s was %s, and is %s", m.FullName(), signature(m), signature(now))
		}
	}
}

func signature(m protoreflect.MethodDescriptor) string {
	return fmt.Sprintf("(%s, stream %v) returns (%s, stream %v)", m.Input().FullName(), m.IsStreamingClient(), m.Output().FullName(), m.IsStreamingServer())
}
