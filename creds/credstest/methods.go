package credstest

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/emptypb"
)

const strangersToken = "stranger-0123456789"

// StrangerPolicy is the text of a policy by which Refused can call.
func StrangerPolicy() string {
	return fmt.Sprintf("identities: [{name: stranger, token_sha256: [%x], rights: [ac:read], instances: [nowhere]}]", sha256.Sum256([]byte(strangersToken)))
}

// Refused calls each method of the server at addr, which has the StrangerPolicy, as
// nobody and as an identity without the right. Each is to say what is missing, as the
// table in readme, the README.md of creds, has it. It returns how many there are.
func Refused(t *testing.T, addr, readme string) int {
	t.Helper()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() //nolint:errcheck // nothing is lost by it
	known := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+strangersToken)
	rights := table(t, readme)
	methods := methodsOf(known, t, conn)
	for _, m := range methods {
		if strings.HasPrefix(m, "/grpc.health.") {
			continue // for everyone
		}
		err := call(t.Context(), conn, m)
		if status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "authorization: Bearer TOKEN") {
			t.Errorf("%s by nobody: %v, want UNAUTHENTICATED that says what to send", m, err)
		}
		if strings.HasPrefix(m, "/grpc.reflection.") || strings.HasSuffix(m, "/GetCapabilities") {
			continue // for all identities
		}
		want := rights[m[strings.LastIndexByte(m, '/')+1:]]
		if want == nil {
			want = []string{"admin"}
		}
		err = call(known, conn, m)
		says := "stranger lacks the right " + strings.Join(want, " or ")
		if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), m) {
			t.Errorf("%s by an identity without the right: %v, want PERMISSION_DENIED with %q", m, err, says)
		}
	}
	return len(methods)
}

// call makes a call of a method with an empty message, until its end.
func call(ctx context.Context, conn *grpc.ClientConn, method string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	if err != nil {
		return err
	}
	_ = s.SendMsg(&emptypb.Empty{}) // the answer says what was wrong
	_ = s.CloseSend()
	for {
		if err := s.RecvMsg(&emptypb.Empty{}); err != nil {
			return err
		}
	}
}

// rightPattern finds the first cell of a row of the table, and cellPattern the methods.
var (
	rowPattern    = regexp.MustCompile("(?m)^\\| `([a-z:]+)`[^|]*\\|([^|]*)\\|")
	methodPattern = regexp.MustCompile(`[A-Z][a-z]+[A-Za-z]*`)
)

// table is the rights by the names of methods, in the order of the rows.
func table(t *testing.T, readme string) map[string][]string {
	t.Helper()
	data, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	rights := map[string][]string{}
	for _, row := range rowPattern.FindAllStringSubmatch(string(data), -1) {
		if row[1] == "admin" {
			continue // everything else
		}
		for _, m := range methodPattern.FindAllString(row[2], -1) {
			if !slices.Contains(rights[m], row[1]) {
				rights[m] = append(rights[m], row[1])
			}
		}
	}
	if len(rights) < 20 {
		t.Fatalf("%s has no table of rights any more: %v", readme, rights)
	}
	return rights
}

// methodsOf lists what the server serves, by reflection.
func methodsOf(ctx context.Context, t *testing.T, conn *grpc.ClientConn) []string {
	t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(r *reflectionpb.ServerReflectionRequest) *reflectionpb.ServerReflectionResponse {
		if err := s.Send(r); err != nil {
			t.Fatal(err)
		}
		resp, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	var methods []string
	list := ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
	for _, service := range list.GetListServicesResponse().GetService() {
		files := ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: service.Name}})
		n := len(methods)
		for _, data := range files.GetFileDescriptorResponse().GetFileDescriptorProto() {
			file := &descriptorpb.FileDescriptorProto{}
			if err := proto.Unmarshal(data, file); err != nil {
				t.Fatal(err)
			}
			for _, d := range file.Service {
				if file.GetPackage()+"."+d.GetName() != service.Name {
					continue
				}
				for _, m := range d.Method {
					methods = append(methods, "/"+service.Name+"/"+m.GetName())
				}
			}
		}
		if len(methods) == n {
			t.Errorf("the methods of %s are not known: %v", service.Name, files)
		}
	}
	return methods
}
