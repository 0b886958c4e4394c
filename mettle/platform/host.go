package platform

import "runtime"

// Host returns the properties of the machine that this program runs on, as far
// as the lexicon has words for them.
func Host() []Property {
	return host(runtime.GOOS, runtime.GOARCH)
}

func host(goos, goarch string) []Property {
	family := goos
	switch goos {
	case "darwin":
		family = "macos"
	case "solaris", "illumos":
		family = "sunos"
	}
	props := []Property{{osFamily, family}, {"Arch", goarch}}
	isa := map[string][]string{
		"386":     {"x86-32"},
		"amd64":   {"x86-64"},
		"arm":     {"arm-a32"},
		"arm64":   {"arm-a64", "armv8"},
		"loong64": {"la64v100"},
		"ppc64":   {"power-isa-be"},
		"ppc64le": {"power-isa-le"},
		"riscv64": {"rv64g"},
		"sparc64": {"sparc-v9"},
	}
	for _, v := range isa[goarch] {
		props = append(props, Property{"ISA", v})
	}
	return props
}
