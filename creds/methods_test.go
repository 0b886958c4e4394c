package creds

import (
	"slices"
	"testing"

	assetpb "github.com/bazelbuild/remote-apis/build/bazel/remote/asset/v1"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	logpb "github.com/bazelbuild/remote-apis/build/bazel/remote/logstream/v1"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// TestRules: each method of the services that are served is in the table, and its
// requests name what the table says, in the field that is read.
func TestRules(t *testing.T) {
	field := map[scope][]string{
		byInstance: {"instance_name"}, byRead: {"resource_name"}, byWrite: {"resource_name"}, byOperation: {"name"}, byParent: {"parent"},
	}
	for _, file := range []protoreflect.FileDescriptor{
		repb.File_build_bazel_remote_execution_v2_remote_execution_proto,
		assetpb.File_build_bazel_remote_asset_v1_remote_asset_proto,
		logpb.File_build_bazel_remote_logstream_v1_remote_logstream_proto,
		bytestream.File_google_bytestream_bytestream_proto,
	} {
		for i := range file.Services().Len() {
			service := file.Services().Get(i)
			for j := range service.Methods().Len() {
				m := service.Methods().Get(j)
				name := "/" + string(service.FullName()) + "/" + string(m.Name())
				r := ruleOf(name)
				if slices.Contains(r.any, Admin) || r.public {
					t.Errorf("%s is not in the table", name)
					continue
				}
				f := m.Input().Fields().ByNumber(nameField)
				if f == nil || f.Kind() != protoreflect.StringKind || !slices.Contains(field[r.scope], string(f.Name())) {
					t.Errorf("%s: field %d of %s is %v, want %v", name, nameField, m.Input().Name(), f, field[r.scope])
				}
			}
		}
	}
	for _, name := range []string{"/mettle.store.v1.Store/Remove", "/a.B/C", "", "/build.bazel.remote.execution.v2.Execution/Other"} {
		if r := ruleOf(name); !slices.Equal(r.any, []Right{Admin}) || r.scope != everywhere || r.public || r.known {
			t.Errorf("%q: %+v, want that it takes admin", name, r)
		}
	}
}
