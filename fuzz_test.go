package mettle_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// fuzzed lists what the fuzz targets are about: the functions that make values of
// foreign bytes, those of the target's own package by their name alone. A new one
// needs a place here, or in unfuzzed.
//
//nolint:gochecknoglobals // an immutable table
var fuzzed = map[string][]string{
	"creds.FuzzCertificates":                       {"chainEnd", "keyPair", "latestEnd"},
	"creds.FuzzPolicy":                             {"hashNode.UnmarshalYAML", "isLoopbackURL", "parsePolicy"},
	"creds.FuzzKeys":                               {"parseKeys"},
	"creds.FuzzKeysAt":                             {"keysAt"},
	"creds.FuzzTokens":                             {"policyBuilder.tokens"},
	"creds.FuzzVerify":                             {"claimsOf", "issuerOf", "parseToken"},
	"elan.FuzzDigests":                             {"digestArgs.parse"},
	"elan.FuzzEntryResults":                        {"entryResults.Get"},
	"elan/action.FuzzEntries":                      {"Cache.get", "Failures.Get", "readListing"},
	"elan/asset.FuzzAnswers":                       {"checkType", "origin", "retryAfter"},
	"elan/asset.FuzzCatAll":                        {"catAll"},
	"elan/asset.FuzzParseSRI":                      {"checksumOf", "decodeHash"},
	"elan/asset.FuzzParseTree":                     {"parseTree"},
	"elan/asset.FuzzQualifiers":                    {"headers.read", "headers.readJSON", "want.source"},
	"elan/asset.FuzzRecall":                        {"Service.recall"},
	"elan/asset.FuzzUnpack":                        {"unpack", "unpackTar", "unpackZip"},
	"elan/blob/bucket.FuzzNames":                   {"parseInstance"},
	"elan/blob/bucket.FuzzParseQuery":              {"ParseQuery"},
	"elan/blob/chunked.FuzzDecode":                 {"decode"},
	"elan/blob/compressed.FuzzParseHeader":         {"parseHeader"},
	"elan/blob/file.FuzzParseBlobName":             {"Store.dropOutdated"},
	"elan/blob/file.FuzzParseEntry":                {"parseEntry"},
	"elan/blob/file.FuzzParseKey":                  {"parseKey"},
	"elan/blob/file.FuzzSmallFiles":                {"Store.readScrubState", "recovery.read"},
	"elan/blob/file/pack.FuzzIndex":                {"Store.writtenAt"},
	"elan/blob/file/pack.FuzzSecret":               {"loadSecret"},
	"elan/blob/file/pack.FuzzSegment":              {"secret.header", "secret.parse", "secret.skip"},
	"elan/blob/gcs.FuzzParseBatch":                 {"parseBatch"},
	"elan/blob/gcs.FuzzReadStat":                   {"parseVersion", "readStat"},
	"elan/blob/open.FuzzParse":                     {"duration", "parse", "spec.options"},
	"elan/blob/s3.FuzzHeaders":                     {"decodeCRC32C", "totalOf"},
	"elan/blob/s3.FuzzParseURL":                    {"ParseURL"},
	"elan/client.FuzzReadPage":                     {"readPage"},
	"elan/compress.FuzzDecode":                     {"New", "newStreamDecoder"},
	"elan/digest.FuzzParse":                        {"ParseSize"},
	"elan/flags.FuzzSize":                          {"Size.UnmarshalText"},
	"elan/rpc.FuzzRequests":                        {"overlooksStatus"},
	"elan/tree.FuzzCheck":                          {"elan/blob.UnmarshalMessage", "Contents.add", "Expand", "eachDirectory"},
	"elan/tree.FuzzScan":                           {"uvarint"},
	"elan/wire.FuzzUnmarshal":                      {"Codec.Unmarshal", "lengthDelimited", "parseDigest", "parseVarint"},
	"metrics.FuzzHost":                             {"ours"},
	"metrics.FuzzRequestMetadata":                  {"ParseRequestMetadata"},
	"metrics/tracing.FuzzOrigin":                   {"invocationOf", "ofClient", "parseUUID", "share.takes"},
	"mettle.FuzzAddresses":                         {"isHere", "queueFlags.secrets"},
	"mettle/api.FuzzCodeOf":                        {"codeOf"},
	"mettle/api.FuzzInline":                        {"Server.inlineInto"},
	"mettle/api.FuzzParseToken":                    {"Server.parseToken"},
	"mettle/api.FuzzPrepare":                       {"Server.read"},
	"mettle/api.FuzzSchedule":                      {"Server.schedule", "invocationOf"},
	"mettle/api.FuzzTookOf":                        {"bytesOf", "eachField", "tookOf"},
	"mettle/bench.FuzzAnswer":                      {"everyField", "lastOperation.decode"},
	"mettle/bench.FuzzProbe":                       {"parseMetrics", "sample.addStat"},
	"mettle/operation.FuzzParseName":               {"parseFlags", "parseID"},
	"mettle/platform.FuzzParsePool":                {"ParsePool"},
	"mettle/queue/nats.FuzzMessages":               {"Queue.accept", "Queue.handleNotice", "intake.answer"},
	"mettle/queue/nats.FuzzParseRecord":            {"parseRecord"},
	"mettle/queue/nats.FuzzParseURL":               {"Options.set", "ParseURL", "address"},
	"mettle/queue/open.FuzzParseURL":               {"parsePubSub", "mettle/queue/pubsub.ParseURL"},
	"mettle/queue/pubsub.FuzzMessages":             {"Queue.fresh", "Queue.freshNotice", "Queue.newLease", "parseCount", "publishedAt"},
	"mettle/worker.FuzzMemory":                     {"memory.fields", "memory.number"},
	"mettle/worker.FuzzMessage":                    {"run.message", "usageIn"},
	"mettle/worker/cgroup.FuzzInside":              {"Inside.number", "field"},
	"mettle/worker/cgroup.FuzzTake":                {"Take", "mettle/worker/runner/helper.helper.bound"},
	"mettle/worker/image.FuzzCredentials":          {"canonical", "credentials.Authorization"},
	"mettle/worker/image.FuzzLayout":               {"inspect", "layout.tagged", "ofManifest", "record.configure"},
	"mettle/worker/image.FuzzParse":                {"isLoopback", "parse", "parseDigest"},
	"mettle/worker/image.FuzzRestore":              {"Cache.readRecords", "Cache.restore", "readJSON", "readLayer"},
	"mettle/worker/image.FuzzTarball":              {"Cache.openTarball", "tarball.locate", "tarball.savedImages"},
	"mettle/worker/image.FuzzUnpack":               {"decompress", "unpack"},
	"mettle/worker/inputroot.FuzzParseDirents":     {"parseDirents"},
	"mettle/worker/persistent.FuzzResponses":       {"newResponses", "responses.next"},
	"mettle/worker/runner/helper.FuzzNext":         {"helper.next", "helper.readText"},
	"mettle/worker/runner/helper.FuzzParentIn":     {"parentIn"},
	"mettle/worker/runner/helper.FuzzParseReply":   {"parseReply"},
	"mettle/worker/runner/helper.FuzzParseRequest": {"parseRequest", "reader.uint32"},
}

// unfuzzed lists the others, and why nothing is to be feared of what they read. What
// generated code and the standard library read alone is theirs to fuzz.
//
//nolint:gochecknoglobals // an immutable table
var unfuzzed = map[string]string{
	"metrics.loopback":                             "addresses of sockets",
	"mettle/operation.NewName":                     "bytes that are random",
	"elan/gate.lines":                              "the kernel's files",
	"elan/gate.lower":                              "the kernel's files",
	"mettle.queueFlags.watch":                      "the operator's own URL, which mettle/queue/open.FuzzParseURL is about",
	"proto/releases.compareVersions":               "files of this repository",
	"proto/releases.Release.AsKnown":               "files of this repository",
	"proto/releases.Open":                          "files of this repository",
	"creds.isLoopbackTarget":                       "the operator's own address",
	"creds/credstest.Authority.sign":               "for tests",
	"creds/credstest.methodsOf":                    "for tests",
	"elan/asset.Guard.Check":                       "addresses that the resolver has found",
	"elan/asset.Guard.Control":                     "addresses of sockets",
	"elan/blob/blobtest.Chaos":                     "for tests",
	"elan/blob/blobtest.restoreEntries":            "for tests",
	"elan/blob/file/pack.secret.hash":              "of keys that we have made",
	"elan/blob/file/pack.segments.load":            "the names of files, whose contents FuzzSegment is about",
	"elan.target.openStorage":                      "the caller's own URL, which elan/blob/open.FuzzParse is about",
	"mettle.storageFlags.check":                    "the operator's own address, which elan/client.FuzzParseTargets is about",
	"elan/client.SpeaksTLS":                        "the caller's own address",
	"elan/digest.joiner.join":                      "hashes that we have computed",
	"metrics/catalog.parse":                        "descriptions of our own metrics",
	"metrics/tracing.CheckURL":                     "a flag of the operator's",
	"metrics/tracing.newExporter":                  "the same flag",
	"metrics/tracing.Tracer.waited":                "a time that an API server wrote, for time.Parse",
	"elan/flags.hostOf":                            "a flag of the operator's",
	"elan/flags.Tracing.fromEnvironment":           "the environment, which the operator sets",
	"mettle/api.Server.logEnd":                     "a response by generated code, of which the message of its status is logged",
	"mettle/bench.rawFlood":                        "the operator's own address",
	"mettle/bench.dataCounter.take":                "of a server that one measures, by generated code's own functions",
	"mettle/conform.T.decompressed":                "of a server that one tests, by a library that is fuzzed",
	"mettle/conform.T.tree":                        "of a server that one tests, by generated code",
	"mettle/queue/nats.Queue.claim":                "a Job by generated code, whose fields are those of FuzzMessages",
	"mettle/queue/nats.Queue.marshalUpdate":        "a response of our own worker",
	"mettle/queue/nats.Queue.secure":               "files of the operator",
	"mettle/queue/nats.Queue.share":                "a Job by generated code",
	"mettle/queue/nats.Queue.tellOfEnd":            "a Job by generated code",
	"mettle/queue/pubsub.marshalUpdate":            "a response of our own worker",
	"mettle/queue/queuetest.suite.wantCancelled":   "for tests",
	"mettle/queue/queuetest.testAttempts":          "for tests",
	"mettle/queue/queuetest.testReject":            "for tests",
	"mettle/worker.kernelIsAtLeast":                "the kernel's own version",
	"mettle/worker/cgroup.killGroup":               "process ids, from the kernel",
	"mettle/worker/hostile.ParseView":              "for tests",
	"mettle/worker/hostile.number":                 "for tests",
	"mettle/worker/hostile.processesOfUser":        "for tests",
	"mettle/worker/hostile.sysVKeyOf":              "for tests",
	"mettle/worker/image.hasFileWhiteouts":         "the kernel's own version",
	"mettle/worker/runner/helper.childrenByScan":   "process ids, from the kernel",
	"mettle/worker/runner/helper.childrenOf":       "process ids, from the kernel",
	"mettle/worker/runner/helper.helper.setUp":     "arguments of our own process",
	"mettle/worker/runner/helper.unlinked.numbers": "descriptors, from the kernel",
	"mettle/worker/runner/runnertest.atoi":         "for tests",
	"mettle/worker/runner/sandbox.cell.Enter":      "configuration of our own process",
}

// decoders are the functions by which bytes and text become values, by the name that
// their package is imported under. What calls one of them is a parser, or part
// of one. A * at the end stands for all that begin so.
//
//nolint:gochecknoglobals // an immutable table
var decoders = []string{
	"json.Unmarshal", "json.NewDecoder", "proto.Unmarshal", "protojson.Unmarshal", "protowire.Consume*", "yaml.Unmarshal", "yaml.NewDecoder", "xml.*",
	"UnmarshalOptions.Unmarshal",
	"binary.Uvarint", "binary.Varint", "binary.ReadUvarint", "LittleEndian.Uint*", "BigEndian.Uint*", "NativeEndian.Uint*",
	"hex.Decode*", "base64.NewDecoder", "StdEncoding.Decode*", "RawURLEncoding.Decode*", "URLEncoding.Decode*", "RawStdEncoding.Decode*",
	"strconv.Parse*", "strconv.Atoi", "strconv.Unquote", "fmt.Sscan*", "bufio.NewScanner", "time.Parse", "time.ParseDuration", "http.ParseTime",
	"tar.NewReader", "zip.NewReader", "gzip.NewReader", "zstd.NewReader", "bzip2.NewReader", "zlib.NewReader",
	"url.Parse", "url.ParseQuery", "url.ParseRequestURI", "netip.Parse*", "net.ParseIP", "net.ParseCIDR", "net.SplitHostPort", "mime.ParseMediaType",
	"pem.Decode", "x509.Parse*", "tls.X509KeyPair", "tls.LoadX509KeyPair", "jose.Parse*", "name.Parse*", "name.New*", "v1.Parse*", "v1.NewHash",
	"trace.*FromHex",
}

// TestArch_parsersAreFuzzed: who writes a function that reads foreign bytes is asked
// for a fuzz target, or for why there is none.
func TestArch_parsersAreFuzzed(t *testing.T) {
	known := map[string]string{}
	for target, parsers := range fuzzed {
		pkg := strings.TrimSuffix(target, path.Ext(target))
		for _, p := range parsers {
			if !strings.Contains(p, "/") {
				p = pkg + "." + p
			}
			known[p] = target
		}
	}
	for p := range unfuzzed {
		if target, twice := known[p]; twice {
			t.Errorf("%s is said to be fuzzed by %s, and not to be fuzzed", p, target)
		}
		known[p] = ""
	}
	found := callers(t)
	for p := range found {
		if _, ok := known[p]; !ok {
			t.Errorf("%s makes values of bytes: add a fuzz target that reaches it, and a line to fuzzed in fuzz_test.go; or a line to unfuzzed, if nobody else can choose the bytes", p)
		}
	}
	targets := fuzzTargets(t)
	for p, target := range known {
		if !found[p] {
			t.Logf("%s reads nothing, or is not there: it can be taken out of fuzz_test.go", p)
		}
		if target != "" && !targets[target] {
			t.Errorf("%s is to be fuzzed by %s, which is not there", p, target)
		}
	}
	if len(found) < 100 || len(targets) < 80 {
		t.Errorf("only %d parsers and %d fuzz targets found: is this the top of the module?", len(found), len(targets))
	}
}

// fuzzTargets finds those of the module, as "elan/digest.FuzzParse".
func fuzzTargets(t *testing.T) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	walkGo(t, func(path string, tree *ast.File) {
		if !strings.HasSuffix(path, "_test.go") {
			return
		}
		for _, decl := range tree.Decls {
			if f, ok := decl.(*ast.FuncDecl); ok && strings.HasPrefix(f.Name.Name, "Fuzz") {
				found[filepath.ToSlash(filepath.Dir(path))+"."+f.Name.Name] = true
			}
		}
	})
	return found
}

// callers finds the functions of the module that call a decoder, tests and generated
// code left out, as "elan/digest.ParseSize" or "creds.Guard.read".
func callers(t *testing.T) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	walkGo(t, func(path string, tree *ast.File) {
		if strings.HasSuffix(path, "_test.go") || ast.IsGenerated(tree) {
			return
		}
		pkg := filepath.ToSlash(filepath.Dir(path))
		for _, decl := range tree.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if !ok {
				continue
			}
			ast.Inspect(f, func(n ast.Node) bool {
				if s, ok := n.(*ast.SelectorExpr); ok && decodes(s) {
					found[pkg+"."+nameOf(f)] = true
				}
				return true
			})
		}
	})
	return found
}

// walkGo parses every Go file of the module.
func walkGo(t *testing.T, visit func(path string, tree *ast.File)) {
	t.Helper()
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if path == "third_party" || d.Name() == "testdata" || path != "." && strings.HasPrefix(d.Name(), ".") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		tree, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err == nil {
			visit(path, tree)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func decodes(s *ast.SelectorExpr) bool {
	var of string
	switch x := s.X.(type) {
	case *ast.Ident:
		of = x.Name
	case *ast.SelectorExpr:
		of = x.Sel.Name
	case *ast.CompositeLit:
		if t, ok := x.Type.(*ast.SelectorExpr); ok {
			of = t.Sel.Name
		}
	}
	name := of + "." + s.Sel.Name
	return slices.ContainsFunc(decoders, func(d string) bool {
		prefix, all := strings.CutSuffix(d, "*")
		return d == name || all && strings.HasPrefix(name, prefix)
	})
}

func nameOf(f *ast.FuncDecl) string {
	if f.Recv == nil {
		return f.Name.Name
	}
	of := f.Recv.List[0].Type
	if p, ok := of.(*ast.StarExpr); ok {
		of = p.X
	}
	if g, ok := of.(*ast.IndexExpr); ok {
		of = g.X
	}
	if i, ok := of.(*ast.Ident); ok {
		return i.Name + "." + f.Name.Name
	}
	return f.Name.Name
}
