package platform_test

import (
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/mettle-build/mettle/mettle/platform"
)

func TestParsePool(t *testing.T) {
	for in, want := range map[string]platform.Pool{
		"gpu":                   {Name: "gpu"},
		"gpu/8":                 {Name: "gpu", Slots: 8},
		"gpu:a=b":               {Name: "gpu", Properties: props(t, "a=b")},
		"a-b.c/16:x=1=2,y=,z=*": {Name: "a-b.c", Slots: 16, Properties: props(t, "x=1=2", "y=", "z=*")},
	} {
		if got, err := platform.ParsePool(in); err != nil || cmp.Diff(want, got) != "" {
			t.Errorf("ParsePool(%q) = %+v, %v, want %+v", in, got, err, want)
		}
	}
	for _, in := range []string{"", ":a=b", "/8", "gpu/", "gpu/x", "gpu/0", "gpu/-1", "gpu/1000000", "gpu:", "gpu:a", "gpu:a=b,,", "gpu:=b", "a,b", "gpu=yes", "a b"} {
		if got, err := platform.ParsePool(in); err == nil {
			t.Errorf("ParsePool(%q) = %+v", in, got)
		}
	}
}

func FuzzParsePool(f *testing.F) {
	for _, s := range []string{"gpu/8:gpu=yes,OSFamily=linux", "a", "a:b=c", "/", ":"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := platform.ParsePool(s)
		if err != nil {
			return
		}
		set, err := platform.New(platform.Options{Pools: []platform.Pool{p}})
		if err != nil {
			t.Fatalf("what was parsed is refused: %v", err)
		}
		want := &repb.Platform{}
		families := 0
		for _, prop := range p.Properties {
			want.Properties = append(want.Properties, &repb.Platform_Property{Name: prop.Name, Value: prop.Value})
			if prop.Name == "OSFamily" {
				families++
			}
		}
		if got, err := set.Match(want); families < 2 && (err != nil || got != p.Name) {
			t.Errorf("Match of all that it has: %q, %v", got, err)
		}
	})
}
