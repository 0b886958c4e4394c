package e2e_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// TestBazel_storeTooSmall builds without the bytes, on a store that has room for
// a third of what the build makes: it completes, or fails and says why, and in
// no case hangs (see bazelTimeout). The server is well after it.
func TestBazel_storeTooSmall(t *testing.T) {
	for _, c := range []struct {
		name, lifetime string
		retries        int
		target         string
		// Of a failure the output has one of these; none: it has to succeed.
		reasons []string
	}{
		// Nothing may go: the store refuses what the actions make.
		{"refuses", "3h", 2, "//big:all", []string{"store is full"}},
		// What is not used for a moment goes. The steps use each other's outputs
		// soon, and so succeed, where Bazel tries again what was refused.
		{"evicts", "100ms", 10, "//big:step23", nil},
		// The last action needs at once more than there is room for, and most of
		// that was evicted. Bazel 4.2 is told which, and has no bytes to upload.
		{"evicts what is needed", "100ms", 10, "//big:all_of_them", []string{"store is full", ".txt (No such file or directory)"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := startDual(t, storeDir(t), "--max_size=10MB", "--min_lifetime="+c.lifetime)
			b := newBazel(t)
			b.writeBigPackage()
			b.Write("small/BUILD", `genrule(name = "small", outs = ["out.txt"], cmd = "echo small > $@")`)
			flags := append(
				b.remote(s),
				"--experimental_remote_download_outputs=minimal",
				"--experimental_inmemory_jdeps_files",
				"--experimental_inmemory_dotd_files",
				fmt.Sprintf("--remote_retries=%d", c.retries),
			)
			out, code := b.Run("build", append(slices.Clip(flags), c.target)...)
			said := slices.ContainsFunc(c.reasons, func(r string) bool { return strings.Contains(out, r) })
			if code != 0 && !said {
				t.Errorf("bazel build ended with %d, and none of %q is in\n%s", code, c.reasons, out)
			}
			if c.target != "//big:step23" && code == 0 {
				t.Errorf("a build that does not fit into the store succeeded:\n%s", out)
			}
			checkOnly(t, b.MustRun("build", append(slices.Clip(flags), "//small")...), "remote")
		})
	}
}

// writeBigPackage adds 24 steps that make a megabyte each, from the outputs of
// the two before, and one that needs the outputs of all.
func (b *bazel) writeBigPackage() {
	b.t.Helper()
	var build strings.Builder
	label := func(i int) string { return fmt.Sprintf("%q", fmt.Sprintf(":step%d", i)) }
	var all []string
	for i := range 24 {
		srcs := strings.Join(all[max(0, i-2):], ", ")
		fmt.Fprintf(&build, `genrule(name = "step%d", srcs = [%s], outs = ["step%d.txt"],
    cmd = "cat $(SRCS) /dev/null > /dev/null; sleep 0.2; (echo step %d; head -c 1000000 /dev/zero) > $@")
`, i, srcs, i, i)
		all = append(all, label(i))
	}
	fmt.Fprintf(&build, `genrule(name = "all_of_them", srcs = [%s], outs = ["all.txt"], cmd = "cat $(SRCS) | wc -c > $@")
`, strings.Join(all, ", "))
	b.Write("big/BUILD", build.String())
}
