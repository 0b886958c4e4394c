package releases_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	queuepb "github.com/mettle-build/mettle/proto/queue"
	"github.com/mettle-build/mettle/proto/releases"
)

//nolint:gochecknoglobals // a flag
var record = flag.String("record", "", "record today's messages as those of this release")

// TestRecord records a release, if it is told to. What was recorded never changes.
func TestRecord(t *testing.T) {
	if *record == "" {
		t.Skip("-record names no release")
	}
	if err := os.Mkdir(*record, 0o755); errors.Is(err, fs.ErrExist) { //nolint:gosec // part of the source
		t.Fatalf("%s was recorded: what a release wrote does not change; record the next one", *record)
	} else if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{"descriptors": encode(descriptors())}
	for name, m := range samples(t) {
		files[name] = encode(m)
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(*record, name+".binpb"), data, 0o644); err != nil { //nolint:gosec // part of the source
			t.Error(err)
		}
	}
}

// each runs a test for each release.
func each(t *testing.T, f func(*testing.T, *releases.Release)) {
	t.Helper()
	names, err := releases.Names()
	if err != nil || !slices.Contains(names, "0.1.0") || !slices.Contains(names, "0.1.0-alpha") {
		t.Fatalf("the releases are %v, %v; want 0.1.0 and what was before it among them", names, err)
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			r, err := releases.Open(name)
			if err != nil {
				t.Fatal(err)
			}
			f(t, r)
		})
	}
}

// TestMessages_unbroken: no field of a released message is gone, or has another
// number, name or type. What it says is what another release would run into.
func TestMessages_unbroken(t *testing.T) {
	each(t, func(t *testing.T, r *releases.Release) {
		found := 0
		for _, is := range today() {
			was, err := r.Files.FindFileByPath(is.Path())
			if err != nil {
				continue // it came later
			}
			found++
			for _, b := range releases.Broken(was, is) {
				t.Errorf("%s: %s", is.Path(), b)
			}
		}
		if found == 0 {
			t.Error("it has none of our files")
		}
	})
}

// TestMessages_read: what a release wrote says today what it said then.
func TestMessages_read(t *testing.T) {
	each(t, func(t *testing.T, r *releases.Release) {
		for name, data := range r.Messages {
			full, _, _ := strings.Cut(name, "-")
			then, err := r.Descriptor(protoreflect.FullName(full))
			if err != nil {
				t.Error(err)
				continue
			}
			was := dynamicpb.NewMessage(then)
			if err := proto.Unmarshal(data, was); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			is := newMessage(t, then)
			if err := proto.Unmarshal(data, is); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if diff := cmp.Diff(asJSON(t, was), asJSON(t, is)); diff != "" {
				t.Errorf("%s (-then +now):\n%s", name, diff)
			}
		}
	})
}

// TestMessages_readByOthers: a release reads of what is written today all that it
// knows, and nothing else than was meant.
func TestMessages_readByOthers(t *testing.T) {
	each(t, func(t *testing.T, r *releases.Release) {
		for name, m := range samples(t) {
			then, err := r.Descriptor(m.ProtoReflect().Descriptor().FullName())
			if err != nil {
				continue // it came later
			}
			was := dynamicpb.NewMessage(then)
			if err := proto.Unmarshal(encode(m), was); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			was.SetUnknown(nil)
			is := proto.CloneOf(m)
			if err := r.AsKnown(is); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if diff := cmp.Diff(asJSON(t, is), asJSON(t, was)); diff != "" {
				t.Errorf("%s (-as today's has it, +as it reads):\n%s", name, diff)
			}
		}
	})
}

func asJSON(t *testing.T, m proto.Message) any {
	t.Helper()
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	var v any
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// TestMessages_recorded: the last release is that of today's messages, or else what
// has come since is told, so that who releases sees that it is to be recorded.
func TestMessages_recorded(t *testing.T) {
	each(t, func(t *testing.T, r *releases.Release) {
		for name, data := range r.Messages {
			m, ok := samples(t)[name]
			if !ok {
				t.Logf("%s: no sample of today's is called so", name)
				continue
			}
			known := proto.CloneOf(m)
			if err := r.AsKnown(known); err != nil {
				t.Error(err)
			}
			if got := encode(known); !bytes.Equal(got, data) {
				t.Errorf("%s: today's writes in the fields that the release has\n%q, it wrote\n%q", name, got, data)
			}
		}
	})
}

// TestRelease_AsKnown: a field that the release before 0.1.0 did not know is gone, the
// others are not.
func TestRelease_AsKnown(t *testing.T) {
	r, err := releases.Open("0.1.0-alpha")
	if err != nil {
		t.Fatal(err)
	}
	u := &queuepb.Update{Operation: "o", Attempt: 2, Stage: queuepb.Update_EXECUTING, StdoutStreamName: "s"}
	if err := r.AsKnown(u); err != nil {
		t.Fatal(err)
	}
	want := &queuepb.Update{Operation: "o", Attempt: 2, Stage: queuepb.Update_EXECUTING}
	if !proto.Equal(u, want) {
		t.Errorf("it knows %v, want %v", u, want)
	}
	if err := r.AsKnown(&descriptorpb.FileDescriptorSet{}); err == nil {
		t.Error("a message that it does not have was known")
	}
}

// TestBroken: each change that would break others is told, and others are not.
func TestBroken(t *testing.T) {
	field := func(m *descriptorpb.FileDescriptorProto, message, name string) *descriptorpb.FieldDescriptorProto {
		for _, d := range m.GetMessageType() {
			for _, f := range d.GetField() {
				if d.GetName() == message && f.GetName() == name {
					return f
				}
			}
		}
		t.Fatalf("no field %s.%s", message, name)
		return nil
	}
	drop := func(m *descriptorpb.FileDescriptorProto) *descriptorpb.DescriptorProto {
		job := m.GetMessageType()[0]
		job.Field = slices.DeleteFunc(job.GetField(), func(f *descriptorpb.FieldDescriptorProto) bool { return f.GetName() == "pool" })
		return job
	}
	for name, c := range map[string]struct {
		change func(*descriptorpb.FileDescriptorProto)
		want   string // empty: it breaks nothing
	}{
		"nothing":  {func(*descriptorpb.FileDescriptorProto) {}, ""},
		"a number": {func(m *descriptorpb.FileDescriptorProto) { field(m, "Job", "pool").Number = proto.Int32(99) }, "Job.pool is gone"},
		"a name":   {func(m *descriptorpb.FileDescriptorProto) { field(m, "Job", "pool").Name = new("queue") }, "is optional string queue"},
		"a type": {func(m *descriptorpb.FileDescriptorProto) {
			field(m, "Job", "priority").Type = descriptorpb.FieldDescriptorProto_TYPE_SINT32.Enum()
		}, "was optional int32 priority, and is optional sint32 priority"},
		"repeated": {func(m *descriptorpb.FileDescriptorProto) {
			field(m, "Job", "pool").Label = descriptorpb.FieldDescriptorProto_LABEL_REPEATED.Enum()
		}, "Job.pool, number 9"},
		"out of the oneof": {func(m *descriptorpb.FileDescriptorProto) { field(m, "Notice", "withdrawal").OneofIndex = nil }, "in the oneof about"},
		"a field gone":     {func(m *descriptorpb.FileDescriptorProto) { drop(m) }, "Job.pool is gone"},
		"a field reserved": {func(m *descriptorpb.FileDescriptorProto) {
			job := drop(m)
			job.ReservedName = []string{"pool"}
			job.ReservedRange = []*descriptorpb.DescriptorProto_ReservedRange{{Start: proto.Int32(9), End: proto.Int32(10)}}
		}, ""},
		"a field more": {func(m *descriptorpb.FileDescriptorProto) {
			m.MessageType[0].Field = append(m.MessageType[0].Field, &descriptorpb.FieldDescriptorProto{
				Name: new("more"), Number: proto.Int32(99), Type: descriptorpb.FieldDescriptorProto_TYPE_BYTES.Enum(),
				Label: descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum(),
			})
		}, ""},
		"a message gone": {func(m *descriptorpb.FileDescriptorProto) {
			field(m, "Notice", "withdrawal").TypeName = new(".mettle.queue.v1.Takeover")
			m.MessageType = m.MessageType[:len(m.MessageType)-1]
		}, "message mettle.queue.v1.Withdrawal is gone"},
		"another value": {func(m *descriptorpb.FileDescriptorProto) {
			m.MessageType[1].EnumType[0].Value[3].Name = new("FAILED")
		}, "Update.REQUEUED, number 3, is FAILED"},
	} {
		t.Run(name, func(t *testing.T) {
			was := queuepb.File_queue_queue_proto
			changed := protodesc.ToFileDescriptorProto(was)
			c.change(changed)
			set := descriptors()
			i := slices.IndexFunc(set.File, func(f *descriptorpb.FileDescriptorProto) bool { return f.GetName() == was.Path() })
			set.File[i] = changed
			files, err := protodesc.NewFiles(set)
			if err != nil {
				t.Fatal(err)
			}
			is, err := files.FindFileByPath(was.Path())
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join(releases.Broken(was, is), "; ")
			if c.want == "" && got != "" || !strings.Contains(got, c.want) {
				t.Errorf("it says %q, want %q in it", got, c.want)
			}
		})
	}
}
