package mettle_test

import (
	"bytes"
	"cmp"
	"flag"
	"fmt"
	"go/ast"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite third_party/README.md and third_party/NOTICES")

// A dependency is a module of go.mod.
type dependency struct {
	path, dir string
	direct    bool
	licences  []string
	programs  []string // the programs that it is linked into
	users     []string // our packages that import it, tests alone as "tests of ..."
	by        []string // the direct dependencies that need it
}

// linkable are the licences of what may be linked into a program that others pass
// on under the Apache License.
//
//nolint:gochecknoglobals // an immutable table
var linkable = []string{"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "ISC", "MIT"}

// TestArch_dependenciesAreReviewed holds third_party/README.md to go.mod: a module
// that comes in is written up there, with its licence, and a licence that asks more
// of those who pass our programs on than to pass notices on is not linked.
func TestArch_dependenciesAreReviewed(t *testing.T) {
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("there is no go command here, which tells what is linked:", err)
	}
	all := dependencies(t)
	for _, d := range all {
		for _, l := range d.licences {
			if len(d.programs) > 0 && !slices.Contains(linkable, l) {
				t.Errorf("%s is linked into %s, and its licence is %s", d.path, strings.Join(d.programs, " and "), l)
			}
		}
		if len(d.licences) == 0 {
			t.Errorf("%s has no licence that is known here", d.path)
		}
	}
	readme := filepath.Join("third_party", "README.md")
	was, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	compare(t, readme, string(was), written(t, string(was), all))
	notices := filepath.Join("third_party", "NOTICES")
	was, err = os.ReadFile(notices)
	if err != nil && !*update {
		t.Fatal(err)
	}
	compare(t, notices, string(was), noticesOf(t, all))
}

func compare(t *testing.T, file, was, want string) {
	t.Helper()
	if was == want {
		return
	}
	if !*update {
		t.Errorf("%s is not that of go.mod: run go test . -run Arch -update, and say in it what a new module is for", file)
		return
	}
	if err := os.WriteFile(file, []byte(want), 0o644); err != nil { //nolint:gosec // for everybody
		t.Fatal(err)
	}
}

// dependencies are the modules of go.mod, by their path.
func dependencies(t *testing.T) []*dependency {
	t.Helper()
	byPath := map[string]*dependency{}
	data, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if strings.HasPrefix(line, "\t") && len(f) >= 2 {
			byPath[f[0]] = &dependency{path: f[0], direct: len(f) == 2}
		}
	}
	of := func(pkg string) *dependency {
		for p := pkg; p != "."; p = path.Dir(p) {
			if d := byPath[p]; d != nil {
				return d
			}
		}
		return nil
	}
	for line := range strings.Lines(goList(t, slices.Concat([]string{"-m", "-f", "{{.Path}} {{.Dir}}"}, slices.Sorted(maps.Keys(byPath)))...)) {
		f := strings.Fields(line)
		if len(f) != 2 {
			t.Skipf("%s is not in the module cache", strings.TrimSpace(line))
		}
		byPath[f[0]].dir = f[1]
	}
	linked(t, of)
	users(t, of)
	neededBy(t, of)
	all := slices.SortedFunc(maps.Values(byPath), func(a, b *dependency) int { return cmp.Compare(a.path, b.path) })
	for _, d := range all {
		for _, text := range licenceFiles(t, d.dir, "licen[cs]e|copying") {
			d.licences = append(d.licences, licencesOf(text)...)
		}
		for _, s := range []*[]string{&d.licences, &d.programs, &d.users, &d.by} {
			slices.Sort(*s)
			*s = slices.Compact(*s)
		}
	}
	return all
}

func goList(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", append([]string{"list"}, args...)...).Output()
	if exit, ok := err.(*exec.ExitError); ok { //nolint:errorlint // as exec returns it
		t.Fatalf("go list: %v: %s", err, exit.Stderr)
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// linked finds out what is in the programs.
func linked(t *testing.T, of func(string) *dependency) {
	t.Helper()
	for _, program := range []string{"elan", "mettle"} {
		for pkg := range strings.Lines(goList(t, "-deps", "./"+program)) {
			if d := of(strings.TrimSpace(pkg)); d != nil {
				d.programs = append(d.programs, program)
			}
		}
	}
}

// users finds out who of ours imports what.
func users(t *testing.T, of func(string) *dependency) {
	t.Helper()
	programs, tests := map[*dependency][]string{}, map[*dependency][]string{}
	walkGo(t, func(file string, tree *ast.File) {
		pkg := filepath.ToSlash(filepath.Dir(file))
		for _, i := range tree.Imports {
			p, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			d := of(p)
			if d == nil {
				continue
			}
			if strings.HasSuffix(file, "_test.go") {
				tests[d] = append(tests[d], pkg)
			} else {
				programs[d] = append(programs[d], pkg)
			}
		}
	})
	for d, pkgs := range tests {
		if len(programs[d]) == 0 {
			d.users = summary("tests of ", pkgs)
		}
	}
	for d, pkgs := range programs {
		d.users = summary("", pkgs)
	}
}

// summary is a list of packages, or how many they are where it says no more.
func summary(prefix string, pkgs []string) []string {
	slices.Sort(pkgs)
	pkgs = slices.Compact(pkgs)
	if len(pkgs) > 4 {
		return []string{prefix + "many packages"}
	}
	out := make([]string, len(pkgs))
	for i, p := range pkgs {
		out[i] = prefix + "`" + p + "`"
	}
	return out
}

// neededBy finds, for each dependency that is not direct, the direct ones whose
// packages, as far as we import them, need it.
func neededBy(t *testing.T, of func(string) *dependency) {
	t.Helper()
	imports, ours := map[string][]string{}, map[string]bool{} // ours: what we import ourselves
	for line := range strings.Lines(goList(t, "-deps", "-test", "-f", "{{.ImportPath}} {{join .Imports \" \"}}", "./...")) {
		f := strings.Fields(line)
		imports[f[0]] = append(imports[f[0]], f[1:]...)
	}
	var visit func(pkg string, root *dependency, seen map[string]bool)
	visit = func(pkg string, root *dependency, seen map[string]bool) {
		if seen[pkg] {
			return
		}
		seen[pkg] = true
		d := of(pkg)
		if d == nil || d != root && ours[pkg] {
			return
		}
		if !d.direct {
			d.by = append(d.by, "`"+root.path+"`")
		}
		for _, i := range imports[pkg] {
			visit(i, root, seen)
		}
	}
	for pkg, is := range imports {
		if strings.HasPrefix(pkg, module) {
			for _, i := range is {
				ours[i] = true
			}
		}
	}
	roots := map[*dependency]map[string]bool{}
	for _, pkg := range slices.Sorted(maps.Keys(imports)) {
		if !strings.HasPrefix(pkg, module) {
			continue
		}
		for _, i := range imports[pkg] {
			if d := of(i); d != nil && d.direct {
				if roots[d] == nil {
					roots[d] = map[string]bool{}
				}
				visit(i, d, roots[d])
			}
		}
	}
}

// licenceFiles are the texts of a module's files whose names begin like that, with
// those of the folders above it in the same repository if there is none.
func licenceFiles(t *testing.T, dir, names string) []string {
	t.Helper()
	pattern := regexp.MustCompile(`(?i)^(` + names + `)([.-].*)?$`)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for _, e := range entries {
		if e.Type().IsRegular() && pattern.MatchString(e.Name()) && filepath.Ext(e.Name()) != ".go" {
			data, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			texts = append(texts, strings.TrimSpace(string(bytes.ReplaceAll(data, []byte("\r"), nil))))
		}
	}
	return texts
}

// licencesOf tells licences by what only they say.
func licencesOf(text string) (found []string) {
	text = strings.Join(strings.Fields(text), " ")
	has := func(s string) bool { return strings.Contains(strings.ToLower(text), strings.ToLower(s)) }
	add := func(name string, ok bool) {
		if ok {
			found = append(found, name)
		}
	}
	mpl := has("Mozilla Public License")
	add("MPL-2.0", mpl) // which names those of GNU, too
	add("GPL, LGPL or AGPL", !mpl && has("GNU ") && has("General Public License"))
	add("Apache-2.0", has("Apache License") && has("Version 2.0") && has("Derivative Works"))
	add("Apache-2.0", has("Licensed under the Apache License, Version 2.0") && !has("Derivative Works"))
	add("MIT", has("Permission is hereby granted, free of charge"))
	add("ISC", has("Permission to use, copy, modify, and distribute this software") || has("Permission to use, copy, modify, and/or distribute this software"))
	add("CC0-1.0", has("CC0 1.0") || has("CC0-1.0"))
	bsd, names := has("Redistribution and use in source and binary forms"), has("neither the name") || has("names of its contributors") || has("names of the contributors") || has("The names of")
	add("BSD-3-Clause", bsd && names)
	add("BSD-2-Clause", bsd && !names)
	return found
}

const (
	directMark   = "<!-- direct: all but the last column is made by go test . -run Arch -update -->\n"
	indirectMark = "<!-- the rest is made by go test . -run Arch -update -->\n"
)

// written is the README with its tables as they should be. What is said of a direct
// module is kept.
func written(t *testing.T, was string, all []*dependency) string {
	t.Helper()
	head, rest, ok := strings.Cut(was, directMark)
	_, rest, ok2 := strings.Cut(rest, "\n\n")
	between, _, ok3 := strings.Cut(rest, indirectMark)
	if !ok || !ok2 || !ok3 {
		t.Fatalf("third_party/README.md has lost one of its marks, %q and %q", directMark, indirectMark)
	}
	said := map[string]string{}
	for line := range strings.Lines(was) {
		if cells := strings.Split(line, "|"); len(cells) == 7 { // before the first and behind the last as well
			said[strings.Trim(cells[1], "` ")] = strings.TrimSpace(cells[5])
		}
	}
	var b strings.Builder
	b.WriteString(head + directMark + "| Module | Licence | In | Used by | What for, and why not the standard library |\n|--|--|--|--|--|\n")
	for _, d := range all {
		if !d.direct {
			continue
		}
		what := said[d.path]
		if what == "" {
			what = "?"
		}
		if what == "?" {
			t.Errorf("third_party/README.md does not say what %s is for, and why the standard library does not do", d.path)
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", d.path, strings.Join(d.licences, ", "), or(d.programs, "tests"), strings.Join(d.users, ", "), what)
	}
	b.WriteString("\n" + between + indirectMark + "\n## By way of others, in the programs\n\n| Module | Licence | In | Needed by |\n|--|--|--|--|\n")
	for _, d := range all {
		if !d.direct && len(d.programs) > 0 {
			fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", d.path, strings.Join(d.licences, ", "), or(d.programs, ""), strings.Join(d.by, ", "))
		}
	}
	b.WriteString("\n## By way of others, in tests or not at all\n\nWhere nothing is named, a module is in go.mod for the sake of another's, and no package of it is built.\n\n| Module | Licence | Needed by |\n|--|--|--|\n")
	for _, d := range all {
		if !d.direct && len(d.programs) == 0 {
			fmt.Fprintf(&b, "| `%s` | %s | %s |\n", d.path, strings.Join(d.licences, ", "), strings.Join(d.by, ", "))
		}
	}
	return b.String()
}

func or(names []string, none string) string {
	if len(names) == 0 {
		return none
	}
	return strings.Join(names, ", ")
}

// noticesOf is what those have to pass on who pass our programs on.
func noticesOf(t *testing.T, all []*dependency) string {
	t.Helper()
	who, first := map[string][]string{}, map[string]string{}
	note := func(name, dir string) {
		for _, text := range licenceFiles(t, dir, "licen[cs]e|copying|notice") {
			words := strings.Join(strings.Fields(text), " ") // the same text is set in many ways
			text = cmp.Or(first[words], text)
			first[words] = text
			who[text] = append(who[text], name)
		}
	}
	for _, d := range all {
		if len(d.programs) > 0 {
			note(d.path, d.dir)
		}
	}
	texts := slices.SortedFunc(maps.Keys(who), func(a, b string) int {
		return cmp.Or(slices.Compare(who[a], who[b]), cmp.Compare(a, b))
	})
	var b strings.Builder
	b.WriteString("What is linked into mettle and elan by others, and the licences and notices that they ask to\npass on. Made by go test . -run Arch -update of go.mod. The licence of the Go standard library,\nwhich is linked too, is that of golang.org/x/sys below.\n")
	for _, text := range texts {
		fmt.Fprintf(&b, "\n%s\n%s\n%s\n\n%s\n", strings.Repeat("=", 80), strings.Join(who[text], "\n"), strings.Repeat("-", 80), text)
	}
	return b.String()
}
