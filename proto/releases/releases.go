// Package releases has what the messages between our programs looked like in each
// release: their descriptors, and a message of each kind as the release wrote it,
// below the folder of its name. A folder, once there, never changes; the README
// of proto/ says how the next one is made.
//
// It is for tests: of compatibility here, and of those that have processes of
// several releases meet (mettle/e2e/sim). No program imports it, and it does not
// know today's messages.
package releases

import (
	"cmp"
	"embed"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

//go:embed [0-9]*
var recorded embed.FS

const (
	// descriptorsFile has a google.protobuf.FileDescriptorSet.
	descriptorsFile = "descriptors.binpb"
	messageSuffix   = ".binpb"
)

// A Release is what was recorded of one. It does not change, and is safe for
// concurrent use.
type Release struct {
	// Name is its version, without a "v".
	Name string
	// Files are the files of its messages, and those that they import.
	Files *protoregistry.Files
	// Messages are those that it wrote, by the message's full name and, after a
	// dash, what is in it.
	Messages map[string][]byte
}

// Names are the releases, the oldest first.
func Names() ([]string, error) {
	entries, err := fs.ReadDir(recorded, ".")
	if err != nil {
		return nil, fmt.Errorf("list the releases: %w", err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	slices.SortFunc(names, compareVersions)
	return names, nil
}

// compareVersions orders as Semantic Versioning does, as far as we use it: numbers, and
// what has something after a dash is before what has not.
func compareVersions(a, b string) int {
	aNumbers, aPre, _ := strings.Cut(a, "-")
	bNumbers, bPre, _ := strings.Cut(b, "-")
	x, y := strings.Split(aNumbers, "."), strings.Split(bNumbers, ".")
	for i := range min(len(x), len(y)) {
		m, _ := strconv.Atoi(x[i])
		n, _ := strconv.Atoi(y[i])
		if c := cmp.Compare(m, n); c != 0 {
			return c
		}
	}
	switch {
	case aPre == bPre:
		return cmp.Compare(len(x), len(y))
	case aPre == "":
		return 1
	case bPre == "":
		return -1
	}
	return cmp.Compare(aPre, bPre)
}

// Open reads a release that Names has told of.
func Open(name string) (*Release, error) {
	r := &Release{Name: name, Messages: map[string][]byte{}}
	entries, err := fs.ReadDir(recorded, name)
	if err != nil {
		return nil, fmt.Errorf("release %s: %w", name, err)
	}
	for _, e := range entries {
		data, err := recorded.ReadFile(name + "/" + e.Name())
		if err != nil {
			return nil, fmt.Errorf("release %s: %w", name, err)
		}
		if e.Name() != descriptorsFile {
			r.Messages[strings.TrimSuffix(e.Name(), messageSuffix)] = data
			continue
		}
		set := &descriptorpb.FileDescriptorSet{}
		if err = proto.Unmarshal(data, set); err == nil {
			r.Files, err = protodesc.NewFiles(set)
		}
		if err != nil {
			return nil, fmt.Errorf("release %s: %w", name, err)
		}
	}
	if r.Files == nil || len(r.Messages) == 0 {
		return nil, fmt.Errorf("release %s: its record is not whole", name)
	}
	return r, nil
}

// Descriptor is that of a message as the release had it.
func (r *Release) Descriptor(name protoreflect.FullName) (protoreflect.MessageDescriptor, error) {
	d, err := r.Files.FindDescriptorByName(name)
	if err != nil {
		return nil, fmt.Errorf("release %s: %s: %w", r.Name, name, err)
	}
	m, ok := d.(protoreflect.MessageDescriptor)
	if !ok {
		return nil, fmt.Errorf("release %s: %s is no message", r.Name, name)
	}
	return m, nil
}

// AsKnown takes out of m, in the message and those within, what a process of the
// release knows nothing of: what it would not see in a message that it gets, and
// would not set in one that it sends.
func (r *Release) AsKnown(m proto.Message) error {
	d, err := r.Descriptor(m.ProtoReflect().Descriptor().FullName())
	if err != nil {
		return err
	}
	data, err := proto.Marshal(m)
	if err != nil {
		return fmt.Errorf("release %s: %w", r.Name, err)
	}
	known := dynamicpb.NewMessage(d)
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(data, known); err != nil {
		return fmt.Errorf("release %s: %w", r.Name, err)
	}
	if data, err = proto.Marshal(known); err != nil {
		return fmt.Errorf("release %s: %w", r.Name, err)
	}
	if err := proto.Unmarshal(data, m); err != nil {
		return fmt.Errorf("release %s: %w", r.Name, err)
	}
	return nil
}
