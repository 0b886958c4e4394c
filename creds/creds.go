// Package creds says who calls, and what they may do: TLS with certificates that
// are read again when they change, bearer tokens, JSON Web Tokens and client
// certificates, rights by instance, limits by identity, and an audit log.
//
// A Guard holds a policy, one file, and is the interceptors of a gRPC server. Each
// call is of an Identity: that of its token, else of its client certificate, else
// the anonymous one where the policy has one. What a call needs is in one table, by
// method (see methods.go); a method that is not in it takes the right admin. The
// package reads of requests what names an instance, and nothing else.
//
// ServerTLS and Client are the two ends of a connection. The mains use this package,
// for each server and each client that they have; elan/rpc asks it who calls.
package creds

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Right is something that a caller may do.
type Right string

// The rights that there are.
const (
	CASRead    Right = "cas:read"    // read blobs, and ask which are there
	CASWrite   Right = "cas:write"   // store blobs
	ACRead     Right = "ac:read"     // read results of actions
	ACWrite    Right = "ac:write"    // set results of actions, and which content an asset has
	Execute    Right = "execute"     // have actions executed, and see to one's own operations
	AssetFetch Right = "asset:fetch" // have the server fetch from origins
	Admin      Right = "admin"       // list, remove and verify what is stored; list all operations
)

// Rights lists all of them.
func Rights() []Right {
	return []Right{CASRead, CASWrite, ACRead, ACWrite, Execute, AssetFetch, Admin}
}

// Identity is who calls. It is immutable.
type Identity struct {
	// Name is that of the policy, with the subject behind a colon where one entry
	// stands for many: "developers:alice@example.com". It is for people, logs and
	// results.
	Name string
	// Kind is how the caller has shown who it is: token, jwt, certificate, or
	// anonymous.
	Kind string
	// For is on whose behalf the call is, as an identity says that may act for others;
	// "" is its own.
	For string

	grants  []grant
	limits  limits
	actsFor bool
}

// join adds what another rule gives to what id has by those before it, none at first:
// all rights, and every limit. The name is that of those who have the first rule.
func (id *Identity) join(rule *Identity, name string) *Identity {
	if id == nil {
		first := *rule
		first.Name = name
		first.grants = slices.Clone(first.grants)
		return &first
	}
	id.grants = append(id.grants, rule.grants...)
	id.limits = id.limits.and(rule.limits)
	id.actsFor = id.actsFor || rule.actsFor
	return id
}

// grant is rights at instances.
type grant struct {
	rights    []Right
	instances []string // patterns
}

// may reports whether the identity has one of the rights at an instance.
func (id *Identity) may(instance string, rights []Right) bool {
	return slices.ContainsFunc(id.grants, func(g grant) bool {
		return g.hasOne(rights) && slices.ContainsFunc(g.instances, func(p string) bool { return matches(p, instance) })
	})
}

// mayAnywhere reports whether the identity has one of the rights at some instance.
func (id *Identity) mayAnywhere(rights []Right) bool {
	return slices.ContainsFunc(id.grants, func(g grant) bool { return g.hasOne(rights) })
}

// mayEverywhere is for what is of no instance.
func (id *Identity) mayEverywhere(rights []Right) bool {
	return slices.ContainsFunc(id.grants, func(g grant) bool { return g.hasOne(rights) && slices.Contains(g.instances, anything) })
}

func (g grant) hasOne(rights []Right) bool {
	return slices.ContainsFunc(rights, func(r Right) bool { return slices.Contains(g.rights, r) })
}

// anything is the pattern that everything matches.
const anything = "*"

// matches reports whether s is what the pattern says: the same, or with a * at its
// end anything that begins so.
func matches(pattern, s string) bool {
	if prefix, ok := strings.CutSuffix(pattern, anything); ok {
		return strings.HasPrefix(s, prefix)
	}
	return pattern == s
}

// printable reports whether s is text that can stand in logs and on pages.
func printable(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

func checkPattern(p string) error {
	if i := strings.Index(p, anything); i >= 0 && i < len(p)-1 {
		return fmt.Errorf("pattern %q: a * stands at the end only", p)
	}
	return nil
}

type identityKey struct{}

// From is who made the call of ctx; nil where nobody asked, because there is no
// policy.
func From(ctx context.Context) *Identity {
	id, _ := ctx.Value(identityKey{}).(*Identity)
	return id
}

func with(ctx context.Context, id *Identity) context.Context {
	return context.WithValue(ctx, identityKey{}, id)
}
