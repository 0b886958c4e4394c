package creds

import (
	"strings"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/mettle-build/mettle/elan/resource"
	"github.com/mettle-build/mettle/elan/wire"
)

// scope is where a request names its instance.
type scope int

const (
	byInstance  scope = iota // field instance_name
	byRead                   // resource_name of a ByteStream.Read
	byWrite                  // resource_name of a ByteStream.Write or QueryWriteStatus
	byOperation              // name of an operation
	byParent                 // parent of a log stream
	everywhere               // it is of all instances
)

// rule is what a method takes. The zero rule takes Admin everywhere, which is that
// of unknown methods.
type rule struct {
	any    []Right // one of them
	scope  scope
	public bool // whoever it is
	known  bool // any identity, with whatever right
	audit  bool
}

const (
	reapi  = "/build.bazel.remote.execution.v2."
	assets = "/build.bazel.remote.asset.v1."
)

// ruleOf is the table of methods.
func ruleOf(method string) rule {
	if name, ok := strings.CutPrefix(method, reapi); ok {
		if r, ok := reapiRule(name); ok {
			return r
		}
	}
	switch method {
	case "/google.bytestream.ByteStream/Read":
		return rule{any: []Right{CASRead}, scope: byRead}
	case "/google.bytestream.ByteStream/Write", "/google.bytestream.ByteStream/QueryWriteStatus":
		return rule{any: []Right{CASWrite}, scope: byWrite}
	case "/build.bazel.remote.logstream.v1.LogStreamService/CreateLogStream":
		return rule{any: []Right{CASWrite}, scope: byParent}
	case assets + "Fetch/FetchBlob", assets + "Fetch/FetchDirectory":
		return rule{any: []Right{AssetFetch}}
	case assets + "Push/PushBlob", assets + "Push/PushDirectory":
		return rule{any: []Right{ACWrite}, audit: true}
	case "/google.longrunning.Operations/GetOperation", "/google.longrunning.Operations/WaitOperation":
		return rule{any: []Right{Execute, Admin}, scope: byOperation}
	case "/google.longrunning.Operations/CancelOperation", "/google.longrunning.Operations/DeleteOperation":
		return rule{any: []Right{Execute, Admin}, scope: byOperation, audit: true}
	}
	switch {
	case strings.HasPrefix(method, "/grpc.health.v1.Health/"):
		return rule{public: true}
	case strings.HasPrefix(method, "/grpc.reflection."):
		return rule{known: true}
	}
	return rule{any: []Right{Admin}, scope: everywhere, audit: true}
}

// reapiRule is the table for the services of the REAPI.
func reapiRule(method string) (rule, bool) {
	switch method {
	case "Capabilities/GetCapabilities":
		return rule{known: true}, true
	case "ContentAddressableStorage/FindMissingBlobs":
		return rule{any: []Right{CASRead, CASWrite}}, true
	case "ContentAddressableStorage/BatchReadBlobs", "ContentAddressableStorage/GetTree",
		"ContentAddressableStorage/SplitBlob", "ContentAddressableStorage/GetChunkMapping":
		return rule{any: []Right{CASRead}}, true
	case "ContentAddressableStorage/BatchUpdateBlobs", "ContentAddressableStorage/SpliceBlob",
		"ContentAddressableStorage/RegisterChunkMapping":
		return rule{any: []Right{CASWrite}}, true
	case "ActionCache/GetActionResult":
		return rule{any: []Right{ACRead}}, true
	case "ActionCache/UpdateActionResult":
		return rule{any: []Right{ACWrite}, audit: true}, true
	case "Execution/Execute":
		return rule{any: []Right{Execute}}, true
	case "Execution/WaitExecution":
		return rule{any: []Right{Execute}, scope: byOperation}, true
	}
	return rule{}, false
}

// nameField is the field by which all requests of these services name their
// instance, resource or operation.
const nameField protowire.Number = 1

// nameOf is what a request names, and false where that can't be told.
func nameOf(req any) (string, bool) {
	switch m := req.(type) {
	case *wire.Raw:
		return m.Text(nameField)
	case interface{ GetInstanceName() string }:
		return m.GetInstanceName(), true
	case interface{ GetResourceName() string }:
		return m.GetResourceName(), true
	case interface{ GetName() string }:
		return m.GetName(), true
	case interface{ GetParent() string }:
		return m.GetParent(), true
	}
	return "", false
}

// instanceOf is the instance that a request names. The error says what is wrong with
// the name; no server would serve it.
func (g *Guard) instanceOf(s scope, name string) (string, error) {
	switch s {
	case byRead, byWrite:
		if n, ok := resource.ParseLogStream(name); ok {
			return n.Parent, nil
		}
		parse := resource.ParseRead
		if s == byWrite {
			parse = resource.ParseWrite
		}
		n, err := parse(name)
		return n.Instance, err
	case byOperation:
		return g.o.OperationInstance(name)
	case byInstance, byParent, everywhere:
	}
	return g.o.Canonical(name), nil
}
