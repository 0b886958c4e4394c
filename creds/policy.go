package creds

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// policyFile is the file as it is written. See README.md.
type policyFile struct {
	Anonymous  *accessNode    `yaml:"anonymous"`
	Identities []identityNode `yaml:"identities"`
	Issuers    []issuerNode   `yaml:"issuers"`
	Limits     limitsNode     `yaml:"limits"`
	Revoked    []serialNode   `yaml:"revoked_certificates"`
}

// accessNode is what somebody may do.
type accessNode struct {
	Rights    []rightNode   `yaml:"rights"`
	Instances []patternNode `yaml:"instances"`
	Grants    []grantNode   `yaml:"grants"`
	Limits    *limitsNode   `yaml:"limits"`
}

type grantNode struct {
	Rights    []rightNode   `yaml:"rights"`
	Instances []patternNode `yaml:"instances"`
}

type identityNode struct {
	Name        textNode         `yaml:"name"`
	TokenSHA256 []hashNode       `yaml:"token_sha256"`
	TokenFile   textNode         `yaml:"token_file"`
	JWT         *jwtNode         `yaml:"jwt"`
	Certificate *certificateNode `yaml:"certificate"`
	ActsFor     bool             `yaml:"acts_for"`
	accessNode  `yaml:",inline"`
}

// jwtNode tells which tokens of an issuer are meant, by patterns of claims.
type jwtNode struct {
	Issuer textNode                 `yaml:"issuer"`
	Claims map[string][]patternNode `yaml:"claims"`
}

// certificateNode tells which client certificates are meant.
type certificateNode struct {
	CommonName patternNode `yaml:"common_name"`
	DNS        patternNode `yaml:"dns"`
	URI        patternNode `yaml:"uri"`
	line       int
}

type issuerNode struct {
	Issuer   textNode   `yaml:"issuer"`
	Audience []textNode `yaml:"audience"`
	JWKSFile textNode   `yaml:"jwks_file"`
	Subject  textNode   `yaml:"subject_claim"`
}

type limitsNode struct {
	CallsPerSecond  float64 `yaml:"calls_per_second"`
	ConcurrentCalls int     `yaml:"concurrent_calls"`
	line            int
}

// textNode is a string that knows its line.
type textNode struct {
	text string
	line int
}

type (
	rightNode   struct{ textNode }
	patternNode struct{ textNode }
	hashNode    struct{ textNode }
	serialNode  struct{ textNode }
)

// lineError is a mistake in the file.
type lineError struct {
	line int
	err  error
}

func (e *lineError) Error() string { return fmt.Sprintf("line %d: %v", e.line, e.err) }
func (e *lineError) Unwrap() error { return e.err }

func wrong(line int, format string, args ...any) error {
	return &lineError{line, fmt.Errorf(format, args...)}
}

// UnmarshalYAML implements yaml.Unmarshaler, as the others below.
func (n *textNode) UnmarshalYAML(node *yaml.Node) error {
	n.line = node.Line
	if node.Kind != yaml.ScalarNode || node.Tag == "!!null" {
		return wrong(node.Line, "want a text")
	}
	n.text = node.Value
	return nil
}

// UnmarshalYAML checks that there is such a right.
func (n *rightNode) UnmarshalYAML(node *yaml.Node) error {
	if err := n.textNode.UnmarshalYAML(node); err != nil {
		return err
	}
	if !slices.Contains(Rights(), Right(n.text)) {
		return wrong(n.line, "%q is no right; there are %v", n.text, Rights())
	}
	return nil
}

// UnmarshalYAML checks the pattern.
func (n *patternNode) UnmarshalYAML(node *yaml.Node) error {
	if err := n.textNode.UnmarshalYAML(node); err != nil {
		return err
	}
	if err := checkPattern(n.text); err != nil {
		return &lineError{n.line, err}
	}
	return nil
}

// UnmarshalYAML checks that it is a hash.
func (n *hashNode) UnmarshalYAML(node *yaml.Node) error {
	if err := n.textNode.UnmarshalYAML(node); err != nil {
		return err
	}
	if b, err := hex.DecodeString(n.text); err != nil || len(b) != sha256.Size {
		return wrong(n.line, "want the SHA-256 of a token, 64 hexadecimal digits, as sha256sum prints it; never the token itself")
	}
	return nil
}

// UnmarshalYAML takes a serial number as openssl prints it, with colons or without.
func (n *serialNode) UnmarshalYAML(node *yaml.Node) error {
	if err := n.textNode.UnmarshalYAML(node); err != nil {
		return err
	}
	serial, ok := new(big.Int).SetString(strings.ReplaceAll(n.text, ":", ""), 16)
	if !ok {
		return wrong(n.line, "%q is no serial number, want hexadecimal digits, as openssl x509 -serial prints them", n.text)
	}
	n.text = serial.Text(16)
	return nil
}

// UnmarshalYAML notes the line.
func (n *limitsNode) UnmarshalYAML(node *yaml.Node) error {
	type plain limitsNode
	if err := decodeStrictly(node, (*plain)(n), "calls_per_second", "concurrent_calls"); err != nil {
		return err
	}
	n.line = node.Line
	if n.CallsPerSecond < 0 || n.ConcurrentCalls < 0 {
		return wrong(node.Line, "a limit is negative; 0 is no limit")
	}
	return nil
}

// UnmarshalYAML notes the line.
func (n *certificateNode) UnmarshalYAML(node *yaml.Node) error {
	type plain certificateNode
	if err := decodeStrictly(node, (*plain)(n), "common_name", "dns", "uri"); err != nil {
		return err
	}
	n.line = node.Line
	if n.CommonName.text == "" && n.DNS.text == "" && n.URI.text == "" {
		return wrong(node.Line, "certificate: want common_name, dns or uri, or every certificate would do")
	}
	return nil
}

// decodeStrictly decodes a mapping that has no keys but those: decoders of nodes
// forget that unknown ones are mistakes.
func decodeStrictly(node *yaml.Node, to any, keys ...string) error {
	if node.Kind != yaml.MappingNode {
		return wrong(node.Line, "want a mapping with %s", strings.Join(keys, ", "))
	}
	for i := 0; i < len(node.Content); i += 2 {
		if k := node.Content[i]; !slices.Contains(keys, k.Value) {
			return wrong(k.Line, "field %s not found; there are %s", k.Value, strings.Join(keys, ", "))
		}
	}
	return node.Decode(to)
}

// maxPolicyBytes bounds the file, and those that it names.
const maxPolicyBytes = 16 << 20

// readFile reads a file of bounded size.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // opened for reading
	data, err := io.ReadAll(io.LimitReader(f, maxPolicyBytes+1))
	if err == nil && len(data) > maxPolicyBytes {
		err = fmt.Errorf("%s has more than %d bytes", path, maxPolicyBytes)
	}
	return data, err
}

// checkGiven refuses what is named and left empty, which would count as left out, and
// so could be taken for nobody and be everybody. The nodes are those of a file of
// bounded size.
func checkGiven(n *yaml.Node) error {
	for i, c := range n.Content {
		empty := c.Kind == yaml.ScalarNode && c.Tag == "!!null" || c.Kind == yaml.SequenceNode && len(c.Content) == 0
		switch {
		case empty && n.Kind == yaml.MappingNode && i%2 == 1:
			return wrong(n.Content[i-1].Line, "%s is empty: say what is meant, or leave it out", n.Content[i-1].Value)
		case empty && n.Kind == yaml.SequenceNode:
			return wrong(c.Line, "there is an empty value in a list")
		}
		if err := checkGiven(c); err != nil {
			return err
		}
	}
	return nil
}

// parsePolicy reads the text of a policy. Paths in it are relative to dir.
func parsePolicy(data []byte, dir string) (*policy, error) {
	var f policyFile
	var tree yaml.Node
	if err := yaml.Unmarshal(data, &tree); err != nil {
		return nil, plainError(err)
	}
	if err := checkGiven(&tree); err != nil {
		return nil, err
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	dec.KnownFields(true)
	if err := dec.Decode(&f); err != nil && !errors.Is(err, io.EOF) {
		return nil, plainError(err)
	}
	if err := dec.Decode(&yaml.Node{}); !errors.Is(err, io.EOF) {
		return nil, errors.New("want one document, there are several")
	}
	p := &policy{tokens: map[[sha256.Size]byte]*Identity{}, revoked: map[string]bool{}, sums: [][sha256.Size]byte{sha256.Sum256(data)}}
	b := policyBuilder{dir: dir, p: p, defaults: f.Limits}
	return p, b.build(&f)
}

// plainError takes the prefix off an error of the YAML library.
func plainError(err error) error {
	if line, ok := errors.AsType[*lineError](err); ok {
		return line
	}
	if t, ok := errors.AsType[*yaml.TypeError](err); ok {
		return errors.New(strings.Join(t.Errors, "; "))
	}
	return errors.New(strings.TrimPrefix(err.Error(), "yaml: "))
}

// policy is a file that was read. It is immutable, but for what is remembered.
type policy struct {
	anonymous    *Identity // nil: callers show who they are
	tokens       map[[sha256.Size]byte]*Identity
	jwts         []jwtRule
	certificates []certificateRule
	issuers      []*issuer
	revoked      map[string]bool     // serial numbers of certificates
	files        []string            // that it was made of, beside itself
	secrets      []string            // those of them that nobody else should read
	sums         [][sha256.Size]byte // of itself and of those files, as they were read

	// remembered are good tokens, with what they have by this policy: one that is read
	// later asks anew.
	remembered verified
}

// policyBuilder makes a policy of a file.
type policyBuilder struct {
	dir      string
	p        *policy
	defaults limitsNode
	names    map[string]int // the lines at which they are
}

func (b *policyBuilder) build(f *policyFile) error {
	b.names = map[string]int{}
	for i := range f.Issuers {
		if err := b.issuer(&f.Issuers[i]); err != nil {
			return err
		}
	}
	if f.Anonymous != nil {
		grants, err := b.grants(0, f.Anonymous)
		if err != nil {
			return fmt.Errorf("anonymous: %w", err)
		}
		b.p.anonymous = &Identity{Name: anonymousName, Kind: anonymousName, grants: grants, limits: b.limits(f.Anonymous)}
	}
	for _, serial := range f.Revoked {
		b.p.revoked[serial.text] = true
	}
	for i := range f.Identities {
		if err := b.identity(&f.Identities[i]); err != nil {
			return err
		}
	}
	if f.Anonymous == nil && len(f.Identities) == 0 { // a file that is being written, say
		return errors.New("it has neither identities nor anonymous, so that nobody could call")
	}
	return nil
}

func (b *policyBuilder) limits(a *accessNode) limits {
	n := b.defaults
	if a.Limits != nil {
		n = *a.Limits
	}
	return limits{perSecond: n.CallsPerSecond, concurrent: n.ConcurrentCalls}
}

// grants are those of an identity whose name is at that line.
func (b *policyBuilder) grants(line int, a *accessNode) ([]grant, error) {
	nodes := a.Grants
	if len(a.Rights) > 0 || len(a.Instances) > 0 {
		nodes = append(nodes, grantNode{a.Rights, a.Instances})
	}
	grants := make([]grant, 0, len(nodes))
	for _, n := range nodes {
		if len(n.Rights) == 0 {
			return nil, wrong(line, "there are instances without rights; rights are %v", Rights())
		}
		g := grant{instances: []string{anything}}
		for _, r := range n.Rights {
			g.rights = append(g.rights, Right(r.text))
		}
		if len(n.Instances) > 0 {
			g.instances = texts(n.Instances)
		}
		grants = append(grants, g)
	}
	return grants, nil
}

func texts(nodes []patternNode) []string {
	out := make([]string, len(nodes))
	for i, n := range nodes {
		out[i] = n.text
	}
	return out
}

func (b *policyBuilder) identity(n *identityNode) error {
	line := n.Name.line
	if n.Name.text == "" {
		return errors.New("identities: each has a name")
	}
	if err := checkName(n.Name.text); err != nil {
		return &lineError{line, err}
	}
	if first, ok := b.names[n.Name.text]; ok {
		return wrong(line, "identity %s is there already, on line %d", n.Name.text, first)
	}
	b.names[n.Name.text] = line
	grants, err := b.grants(line, &n.accessNode)
	if err != nil {
		return err
	}
	if len(grants) == 0 {
		return wrong(line, "identity %s has no rights; there are %v", n.Name.text, Rights())
	}
	id := Identity{Name: n.Name.text, grants: grants, limits: b.limits(&n.accessNode), actsFor: n.ActsFor}
	if len(n.TokenSHA256) == 0 && n.TokenFile.text == "" && n.JWT == nil && n.Certificate == nil {
		return wrong(line, "identity %s can't show itself: want token_sha256, token_file, jwt or certificate", id.Name)
	}
	if err := b.tokens(n, id); err != nil {
		return err
	}
	if n.Certificate != nil {
		id.Kind = "certificate"
		b.p.certificates = append(b.p.certificates, certificateRule{
			commonName: n.Certificate.CommonName.text, dns: n.Certificate.DNS.text, uri: n.Certificate.URI.text, id: id,
		})
	}
	return b.jwt(n, id)
}

// maxNameBytes bounds the name of an identity, which goes into results and logs.
const maxNameBytes = 128

// checkName sees to it that two identities are never taken for each other: what is
// behind a colon is a subject of one of them.
func checkName(name string) error {
	switch {
	case name == anonymousName:
		return fmt.Errorf("the name %s is that of callers who show nothing", name)
	case len(name) > maxNameBytes, !printable(name), strings.Contains(name, ":"):
		return fmt.Errorf("the name %.200q: want %d bytes at most that can be printed, and no colon, behind which subjects stand", name, maxNameBytes)
	}
	return nil
}

// anonymousName is the Name, and the Kind, of callers who show nothing.
const anonymousName = "anonymous"

// tokens takes the identity's tokens, of which hashes are kept.
func (b *policyBuilder) tokens(n *identityNode, id Identity) error {
	id.Kind = "token"
	add := func(line int, hash [sha256.Size]byte) error {
		if other, ok := b.p.tokens[hash]; ok {
			return wrong(line, "this token is that of identity %s already", other.Name)
		}
		b.p.tokens[hash] = &id
		return nil
	}
	for _, h := range n.TokenSHA256 {
		hash, _ := hex.DecodeString(h.text) // checked as it was read
		if err := add(h.line, [sha256.Size]byte(hash)); err != nil {
			return err
		}
	}
	if n.TokenFile.text == "" {
		return nil
	}
	data, err := b.file(n.TokenFile)
	if err != nil {
		return err
	}
	b.p.secrets = append(b.p.secrets, b.p.files[len(b.p.files)-1])
	tokens := 0
	for token := range bytes.FieldsSeq(data) {
		tokens++
		if len(token) < minTokenBytes {
			return wrong(n.TokenFile.line, "%s has a token of %d bytes, which can be guessed; want %d at least (openssl rand -hex 32)", n.TokenFile.text, len(token), minTokenBytes)
		}
		if err := add(n.TokenFile.line, sha256.Sum256(token)); err != nil {
			return err
		}
	}
	if tokens == 0 {
		return wrong(n.TokenFile.line, "%s has no token", n.TokenFile.text)
	}
	return nil
}

// minTokenBytes is what keeps a token from being guessed by trying.
const minTokenBytes = 16

// file reads a file that the policy names.
func (b *policyBuilder) file(n textNode) ([]byte, error) {
	path := n.text
	if !filepath.IsAbs(path) {
		path = filepath.Join(b.dir, path)
	}
	b.p.files = append(b.p.files, path)
	data, err := readFile(path)
	if err != nil {
		return nil, &lineError{n.line, err}
	}
	b.p.sums = append(b.p.sums, sha256.Sum256(data))
	return data, nil
}

// clockSkew is how far clocks of issuers may be apart from ours.
const clockSkew = time.Minute
