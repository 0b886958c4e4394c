package e2e_test

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// layers is a package of rules that depend on each other: each layer's rules on
// some of the layer before. What each makes can be told beforehand.
type layers struct {
	Depth, Width int
	// Pause is how many tenths of a second a rule takes, every SlowEvery-th one
	// instead SlowPause.
	Pause, SlowPause, SlowEvery int
	// LargeEvery-th rules have a second output, of largeBytes.
	LargeEvery int
	// Marks is a directory in which each execution leaves a file, that begins
	// with the name of its action.
	Marks string
	// Salt tells one such package from another: nothing is cached between them.
	Salt string
}

const largeBytes = 1 << 20

// Actions is how many there are.
func (l layers) Actions() int { return l.Depth * l.Width }

func (l layers) sources(layer, i int) []string {
	if layer == 0 {
		return []string{"seed.txt"}
	}
	var names []string
	for k := range 3 {
		names = append(names, fmt.Sprintf("l%d_%d.txt", layer-1, (i*(k+1)+k)%l.Width))
	}
	return names
}

// write writes the package to b's workspace, at //layers.
func (l layers) write(b *bazel) {
	b.Write("layers/seed.txt", l.Salt)
	var build strings.Builder
	for layer := range l.Depth {
		for i := range l.Width {
			n := layer*l.Width + i
			pause := l.Pause
			if l.SlowEvery > 0 && n%l.SlowEvery == 0 {
				pause = l.SlowPause
			}
			name := fmt.Sprintf("l%d_%d", layer, i)
			outs := []string{name + ".txt"}
			mark := fmt.Sprintf("mktemp -p %s %s-%s.XXXXXXXX > /dev/null; ", l.Marks, name, l.Salt)
			cmd := mark + fmt.Sprintf("sleep %d.%d; for s in $(SRCS); do cat $$s; done | { cat; echo %s; } | sha256sum | cut -c1-64 > $(location %s.txt)", pause/10, pause%10, name, name)
			if l.LargeEvery > 0 && n%l.LargeEvery == 0 {
				outs = append(outs, name+".bin")
				cmd += fmt.Sprintf("; { yes $$(cat $(location %s.txt)) 2> /dev/null || true; } | head -c %d > $(location %s.bin)", name, largeBytes, name)
			}
			fmt.Fprintf(&build, "genrule(name = %q, srcs = %s, outs = %s, cmd = %q)\n",
				name, list(l.unique(l.sources(layer, i))), list(outs), "set -e; "+cmd)
		}
	}
	b.Write("layers/BUILD", build.String())
}

// unique drops what Bazel would refuse: a source that comes twice.
func (l layers) unique(names []string) []string {
	var out []string
	seen := map[string]bool{}
	for _, n := range names {
		if !seen[n] {
			out = append(out, n)
			seen[n] = true
		}
	}
	return out
}

func list(names []string) string { return "[\"" + strings.Join(names, "\", \"") + "\"]" }

// check compares what b has built with what it is to be.
func (l layers) check(b *bazel) {
	b.t.Helper()
	want := map[string]string{"seed.txt": l.Salt}
	bad := 0
	compare := func(name, content string) {
		got, err := os.ReadFile(filepath.Join(b.bin(), "layers", name))
		if err != nil || string(got) != content {
			if bad++; bad < 10 {
				b.t.Errorf("output %s is not what it must be (%d bytes, want %d, error %v)", name, len(got), len(content), err)
			}
		}
	}
	for layer := range l.Depth {
		for i := range l.Width {
			name := fmt.Sprintf("l%d_%d", layer, i)
			var in strings.Builder
			for _, s := range l.unique(l.sources(layer, i)) {
				in.WriteString(want[s])
			}
			sum := sha256.Sum256([]byte(in.String() + name + "\n"))
			text := hex.EncodeToString(sum[:]) + "\n"
			want[name+".txt"] = text
			compare(name+".txt", text)
			if n := layer*l.Width + i; l.LargeEvery > 0 && n%l.LargeEvery == 0 {
				compare(name+".bin", strings.Repeat(text, largeBytes/len(text)+1)[:largeBytes])
			}
		}
	}
}
