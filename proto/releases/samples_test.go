package releases_test

import (
	"maps"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/durationpb"

	persistentpb "github.com/mettle-build/mettle/proto/persistent"
	queuepb "github.com/mettle-build/mettle/proto/queue"
	storepb "github.com/mettle-build/mettle/proto/store"
	workerpb "github.com/mettle-build/mettle/proto/worker"
)

// today are the files of our messages.
func today() []protoreflect.FileDescriptor {
	return []protoreflect.FileDescriptor{
		queuepb.File_queue_queue_proto, storepb.File_store_store_proto, workerpb.File_worker_worker_proto, persistentpb.File_persistent_persistent_proto,
	}
}

// descriptors are today's files with those that they import, each after its imports.
func descriptors() *descriptorpb.FileDescriptorSet {
	set := &descriptorpb.FileDescriptorSet{}
	done := map[string]bool{}
	var add func(protoreflect.FileDescriptor)
	add = func(f protoreflect.FileDescriptor) {
		if done[f.Path()] {
			return
		}
		done[f.Path()] = true
		for i := range f.Imports().Len() {
			add(f.Imports().Get(i).FileDescriptor)
		}
		set.File = append(set.File, protodesc.ToFileDescriptorProto(f))
	}
	for _, f := range today() {
		add(f)
	}
	return set
}

// samples are messages of each kind as today's code may send or store them: with
// each field set, with each of those of which only one can be, and of the queue's
// what the stages make of them.
func samples(t *testing.T) map[string]proto.Message {
	t.Helper()
	out := map[string]proto.Message{}
	for _, f := range today() {
		for i := range f.Messages().Len() {
			d := f.Messages().Get(i)
			whole := newMessage(t, d)
			fill(t, whole.ProtoReflect(), nil)
			out[string(d.FullName())+"-whole"] = whole
			for o := range d.Oneofs().Len() {
				for k := range d.Oneofs().Get(o).Fields().Len() {
					one := d.Oneofs().Get(o).Fields().Get(k)
					m := newMessage(t, d)
					fill(t, m.ProtoReflect(), one)
					out[string(d.FullName())+"-"+string(one.Name())] = m
				}
			}
		}
	}
	maps.Copy(out, stages())
	return out
}

// stages are a job as a client that sets nothing asks for it, and the updates about one.
func stages() map[string]proto.Message {
	const name, digest = "i/operations/sha256/hash/1/id", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855/0"
	u := func(stage queuepb.Update_Stage) *queuepb.Update {
		return &queuepb.Update{Operation: name, Attempt: 2, Worker: "worker", Stage: stage}
	}
	completed := u(queuepb.Update_COMPLETED)
	completed.ExecuteResponse = encode(&repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 3, StderrRaw: []byte("no")}})
	return map[string]proto.Message{
		"mettle.queue.v1.Job-bare":         &queuepb.Job{Operation: name, ReplyTo: "api", ActionDigest: digest, Pool: "default", Timeout: durationpb.New(3600e9)},
		"mettle.queue.v1.Update-executing": u(queuepb.Update_EXECUTING),
		"mettle.queue.v1.Update-completed": completed,
		"mettle.queue.v1.Update-requeued":  u(queuepb.Update_REQUEUED),
	}
}

func newMessage(t *testing.T, d protoreflect.MessageDescriptor) proto.Message {
	t.Helper()
	typ, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
	if err != nil {
		t.Fatal(err)
	}
	return typ.New().Interface()
}

// fill sets all fields, and of those of which only one can be the one given, else
// the last.
func fill(t *testing.T, m protoreflect.Message, one protoreflect.FieldDescriptor) {
	t.Helper()
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		switch o := f.ContainingOneof(); {
		case o != nil && !o.IsSynthetic() && one != nil && o == one.ContainingOneof() && f != one:
		case f.IsMap():
			m.Mutable(f).Map().Set(protoreflect.ValueOfString("key of "+f.TextName()).MapKey(), scalar(f.MapValue()))
		case f.IsList() && f.Message() != nil:
			fill(t, m.Mutable(f).List().AppendMutable().Message(), nil)
		case f.IsList():
			m.Mutable(f).List().Append(scalar(f))
		case f.Message() != nil:
			fill(t, m.Mutable(f).Message(), nil)
		default:
			m.Set(f, scalar(f))
		}
	}
}

// scalar is a value for a field that is not the one of an absent field, and not that
// of the field's neighbours.
func scalar(f protoreflect.FieldDescriptor) protoreflect.Value {
	n := int64(f.Number())
	switch f.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(f.Enum().Values().Get(f.Enum().Values().Len() - 1).Number())
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(n)) //nolint:gosec // a field's number
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(n)) //nolint:gosec // likewise
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(n << 33)
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(float64(n) / 4)
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes(reapi(f))
	default:
		return protoreflect.ValueOfString("the " + f.TextName())
	}
}

// reapi is what a field of bytes has: mostly a message of the Remote Execution API.
func reapi(f protoreflect.FieldDescriptor) []byte {
	d := &repb.Digest{Hash: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
	switch f.Name() {
	case "action":
		return encode(&repb.Action{CommandDigest: d, InputRootDigest: d, DoNotCache: true, Timeout: durationpb.New(60e9)})
	case "command":
		return encode(&repb.Command{Arguments: []string{"a", "b"}, OutputPaths: []string{"out"}, WorkingDirectory: "w"})
	case "request_metadata":
		return encode(&repb.RequestMetadata{ToolInvocationId: "invocation", ActionMnemonic: "Genrule", TargetId: "//a:b"})
	case "execute_response":
		return encode(&repb.ExecuteResponse{
			Result:  &repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: "out", Digest: d, IsExecutable: true}}, StdoutRaw: []byte("said")},
			Message: "message",
		})
	case "partial_metadata":
		return encode(&repb.ExecutedActionMetadata{Worker: "worker"})
	default:
		return []byte("\x00the " + f.TextName() + "\xff")
	}
}

func encode(m proto.Message) []byte {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(err) // nothing in it can fail
	}
	return data
}
