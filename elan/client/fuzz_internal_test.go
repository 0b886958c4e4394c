package client

import (
	"slices"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// FuzzReadPage holds that a page of a tree that is cut up by hand has what generated
// code reads of it.
func FuzzReadPage(f *testing.F) {
	page, err := proto.Marshal(&repb.GetTreeResponse{
		Directories:   []*repb.Directory{{Files: []*repb.FileNode{{Name: "a"}}}, {}},
		NextPageToken: "next",
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(page)
	f.Add(protowire.AppendVarint(protowire.AppendTag(page, 1, protowire.VarintType), 7))
	f.Add(page[:len(page)-1])
	f.Add([]byte("\x0b\x0c\x0a\x00\x12\x00"))
	f.Fuzz(func(t *testing.T, page []byte) {
		var got []string
		token, err := readPage(page, func(data []byte) error {
			got = append(got, string(data))
			return nil
		})
		want := &repb.GetTreeResponse{}
		if proto.Unmarshal(page, want) != nil { // also where a Directory is none, of which a page tells nothing
			return
		}
		if err != nil || token != want.NextPageToken || len(got) != len(want.Directories) {
			t.Fatalf("%d directories, token %q, %v; want %d and %q", len(got), token, err, len(want.Directories), want.NextPageToken)
		}
		for i, text := range got {
			d := &repb.Directory{}
			if err := proto.Unmarshal([]byte(text), d); err != nil || !proto.Equal(d, want.Directories[i]) {
				t.Errorf("directory %d is %v, %v; want %v", i, d, err, want.Directories[i])
			}
		}
	})
}

// FuzzParseTargets: addresses are read or refused, and read again as the same.
func FuzzParseTargets(f *testing.F) {
	for _, s := range []string{"localhost:7777", "grpc://a:1, grpc://b:2", "dns:///elan:7777", "a:1,", "unix:/x", "grpc://grpc://a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		targets, err := ParseTargets(text)
		if err != nil {
			return
		}
		if len(targets) == 0 || slices.Contains(targets, "") {
			t.Errorf("%q is read as %q", text, targets)
		}
		if len(targets) > 1 && slices.ContainsFunc(targets, func(s string) bool { return strings.Contains(s, "://") }) {
			t.Errorf("%q is read as %q", text, targets)
		}
	})
}
