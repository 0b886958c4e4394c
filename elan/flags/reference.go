package flags

import (
	"fmt"
	"strings"

	"github.com/alecthomas/kong"
)

// Reference is a page of Markdown with every command of a program, its
// arguments and its flags with their environment variables and defaults, from
// the same tags that --help prints. Each flag that several commands have stands
// with each of them.
func (p Program) Reference(c Commands) (string, error) {
	parser, err := p.Parser(c, func(int) {})
	if err != nil {
		return "", err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "# The flags of %s\n\n%s\n\nA flag is given as `--flag=value`, or by its environment variable, which the flag overrules. "+
		"This page is made from the program's own `--help` (`go test ./%s -run Flags -update`).\n", p.Name, p.Description, p.Name)
	fmt.Fprintf(&b, "\n## Every command\n\n%s", table(parser.Model.Flags))
	commands(&b, parser.Model.Node)
	return b.String(), nil
}

// commands writes the commands below n, without those that are hidden.
func commands(b *strings.Builder, n *kong.Node) {
	for _, c := range n.Children {
		if c.Hidden || c.Type != kong.CommandNode {
			continue
		}
		fmt.Fprintf(b, "\n## %s\n\n%s\n", strings.TrimSpace(c.FullPath()), c.Help)
		if c.Detail != "" {
			fmt.Fprintf(b, "\n%s\n", c.Detail)
		}
		for i, a := range c.Positional {
			if i == 0 {
				b.WriteString("\n")
			}
			fmt.Fprintf(b, "- `%s`: %s\n", a.Summary(), a.Help)
		}
		if len(c.Flags) > 0 {
			fmt.Fprintf(b, "\n%s", table(c.Flags))
		}
		commands(b, c)
	}
}

func table(flags []*kong.Flag) string {
	var b strings.Builder
	b.WriteString("| Flag | Environment | Default | What |\n|--|--|--|--|\n")
	for _, f := range flags {
		if f.Hidden || f.Name == "help" {
			continue
		}
		name := "`--" + f.Name + "`"
		if f.Short != 0 {
			name = fmt.Sprintf("`-%c`, %s", f.Short, name)
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", name, code(strings.Join(f.Tag.Envs, ", ")), code(f.Default), cell(f.Help))
	}
	return b.String()
}

// code is s as code, or nothing.
func code(s string) string {
	if s == "" {
		return ""
	}
	return "`" + cell(s) + "`"
}

// cell is s as it may stand in a table.
func cell(s string) string {
	return strings.ReplaceAll(strings.ReplaceAll(s, "\n", " "), "|", `\|`)
}
