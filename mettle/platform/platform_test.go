package platform_test

import (
	"errors"
	"runtime"
	"slices"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/mettle/platform"
)

// ask makes a Platform of "name=value" strings.
func ask(props ...string) *repb.Platform {
	p := &repb.Platform{}
	for _, s := range props {
		name, value, _ := strings.Cut(s, "=")
		p.Properties = append(p.Properties, &repb.Platform_Property{Name: name, Value: value})
	}
	return p
}

func props(t testing.TB, ss ...string) []platform.Property {
	t.Helper()
	out := make([]platform.Property, 0, len(ss))
	for _, s := range ss {
		p, err := platform.ParseProperty(s)
		if err != nil {
			t.Fatal(err)
		}
		if p.String() != s {
			t.Errorf("ParseProperty(%q) is %v", s, p)
		}
		out = append(out, p)
	}
	return out
}

func TestSet_Match(t *testing.T) {
	p, err := platform.New(platform.Options{Pools: []platform.Pool{
		{Name: "default", Properties: props(t, "OSFamily=linux", "ISA=x86-64", "ISA=x86-avx2", "lang=c=1", "ws=*")},
		{Name: "gpu", Properties: props(t, "OSFamily=linux", "ISA=x86-64", "gpu=yes", "cuda=12", "disk=ssd", "net=fast")},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if got := p.Names(); !slices.Equal(got, []string{"default", "gpu"}) {
		t.Errorf("Names() is %v", got)
	}
	for name, tc := range map[string]struct {
		want *repb.Platform
		pool string
		errs []string // what the refusal says
	}{
		"nil":                        {want: nil, pool: "default"},
		"nothing asked":              {want: ask(), pool: "default"},
		"as in the lexicon":          {want: ask("OSFamily=linux"), pool: "default"},
		"as Bazel users write it":    {want: ask("OSFamily=Linux"), pool: "default"},
		"the same twice":             {want: ask("OSFamily=linux", "OSFamily=Linux"), pool: "default"},
		"all of ISA":                 {want: ask("ISA=x86-64", "ISA=x86-avx2"), pool: "default"},
		"no container":               {want: ask("container-image=none"), pool: "default"},
		"no network":                 {want: ask("network=none"), pool: "default"},
		"empty network":              {want: ask("network="), pool: "default"},
		"a network":                  {want: ask("network=external"), errs: []string{"network", "external", "--allow_network", "none"}},
		"empty container":            {want: ask("container-image="), pool: "default"},
		"a persistent worker":        {want: ask("persistentWorkerKey=0123", "persistentWorkerProtocol=json", "recycle-runner=true"), pool: "default"},
		"by its requirements":        {want: ask("supports-workers=1", "requires-worker-protocol=xml", "gpu=yes"), pool: "gpu"},
		"declared by the operator":   {want: ask("lang=c=1"), pool: "default"},
		"any value":                  {want: ask("ws=9"), pool: "default"},
		"another pool":               {want: ask("gpu=yes", "OSFamily=linux"), pool: "gpu"},
		"another system":             {want: ask("OSFamily=windows"), errs: []string{"OSFamily", "windows", "linux"}},
		"two systems":                {want: ask("OSFamily=linux", "OSFamily=macos"), errs: []string{"OSFamily", "linux", "macos", "one"}},
		"one ISA too many":           {want: ask("ISA=x86-64", "ISA=x86-avx-512"), errs: []string{"ISA", "x86-avx-512", "x86-64", "x86-avx2"}},
		"ISA is compared exactly":    {want: ask("ISA=X86-64"), errs: []string{"ISA", "X86-64"}},
		"a container":                {want: ask("container-image=docker://gcr.io/x"), errs: []string{"container-image", "docker://gcr.io/x", "none"}},
		"unknown":                    {want: ask("dockerNetwork=off"), errs: []string{"dockerNetwork", "off", "ISA, OSFamily, cuda, disk, gpu, lang, net, ws"}},
		"names are compared exactly": {want: ask("osfamily=linux"), errs: []string{"osfamily", "OSFamily"}},
		"in no one pool":             {want: ask("gpu=yes", "lang=c=1"), errs: []string{"gpu=yes", "lang=c=1", "none has all"}},
		"no name":                    {want: ask("=x"), errs: []string{"without a name"}},
		"far too many":               {want: ask(slices.Repeat([]string{"ISA=x86-64"}, 1000)...), errs: []string{"1000 properties"}},
		"nil property":               {want: &repb.Platform{Properties: []*repb.Platform_Property{nil}}, errs: []string{"without a name"}},
	} {
		t.Run(name, func(t *testing.T) {
			pool, err := p.Match(tc.want)
			if len(tc.errs) == 0 {
				if err != nil || pool != tc.pool {
					t.Errorf("Match(%v) = %q, %v, want %q", tc.want, pool, err, tc.pool)
				}
				return
			}
			if !errors.Is(err, platform.ErrUnsupported) {
				t.Fatalf("Match(%v) = %q, %v, want %v", tc.want, pool, err, platform.ErrUnsupported)
			}
			for _, s := range tc.errs {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%q does not mention %q", err, s)
				}
			}
		})
	}
}

func TestSet_Match_messageIsBounded(t *testing.T) {
	var many []platform.Property
	for i := range 128 {
		many = append(many, platform.Property{Name: "p", Value: strings.Repeat("x", i%100) + string(rune('a'+i%26))})
	}
	p, err := platform.New(platform.Options{Pools: []platform.Pool{{Name: "default", Properties: many}}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.Match(ask("p=" + strings.Repeat("y", 1<<20)))
	if err == nil || len(err.Error()) > 4096 {
		t.Errorf("the refusal has %d bytes", len(err.Error()))
	}
}

func TestNew_refuses(t *testing.T) {
	for name, o := range map[string]platform.Options{
		"no name":           {Properties: []platform.Property{{Value: "x"}}},
		"two of one name":   {Pools: []platform.Pool{{Name: "a"}, {Name: "a"}}},
		"a nameless thing":  {Pools: []platform.Pool{{Name: "a", Properties: []platform.Property{{Value: "x"}}}}},
		"nothing and again": {Pools: []platform.Pool{{}, {}}},
	} {
		if _, err := platform.New(o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestParseProperty_refuses(t *testing.T) {
	for _, s := range []string{"", "name", "=value"} {
		if p, err := platform.ParseProperty(s); err == nil {
			t.Errorf("ParseProperty(%q) = %v", s, p)
		}
	}
}

// What every client may ask of a worker on this machine.
func TestHost(t *testing.T) {
	p, err := platform.New(platform.Options{Properties: props(t, "lang=c", "ISA=x86-avx2")})
	if err != nil {
		t.Fatal(err)
	}
	if runtime.GOOS == "linux" && runtime.GOARCH == "amd64" {
		if _, err := p.Match(ask("OSFamily=Linux", "ISA=x86-64", "Arch=amd64", "lang=c", "ISA=x86-avx2")); err != nil {
			t.Error(err)
		}
	}
	if _, err := p.Match(ask("OSFamily=plan10")); err == nil {
		t.Error("this host is everything")
	}
}

func BenchmarkSet_Match(b *testing.B) {
	p, err := platform.New(platform.Options{Properties: props(b, "lang=c", "ISA=x86-avx2")})
	if err != nil {
		b.Fatal(err)
	}
	want := ask("OSFamily=x")
	want.Properties[0].Value = platform.Host()[0].Value
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.Match(want); err != nil {
			b.Fatal(err)
		}
	}
}
