package gate

import repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

// Kind is what a method asks of the server.
type Kind uint8

const (
	// Small takes little memory and CPU, or as its messages come and go.
	Small Kind = iota
	// Batch has a message of up to 16 MiB, some times over while it is parsed, and
	// an answer as large.
	Batch
	// Tree has thousands of blobs be read, and what is found sent as the client takes
	// it.
	Tree
	// Long waits for an action: once it has its first answer it is there for hours, and
	// takes next to nothing.
	Long
)

// placesOf are how many calls of a kind are at work at once, for one connection.
// What is beyond waits with what its window lets it send. With a store that takes
// 50 ms there are 1,200 batches a second. Small and Long have no limit. Where there is less
// memory than placesMemory it is as much fewer, but minPlaces.
//
//nolint:gochecknoglobals // an immutable table
var placesOf = [...]int{Small: 0, Batch: 64, Tree: 8, Long: 0}

const (
	// placesMemory is the MaxMemoryBytes that bears all places: batches of 4 MiB take
	// some 20 MiB each, and should take a fifth of it.
	placesMemory = 6 << 30
	minPlaces    = 4
)

// places is how many calls of a kind are at work at once, with a limit on memory.
func places(k Kind, maxMemory int64) int {
	n := placesOf[k]
	return max(min(n, minPlaces), int(min(int64(n), int64(n)*(maxMemory>>20)/(placesMemory>>20))))
}

// kinds are those of the methods of the Remote Execution API that are not Small.
func kinds() map[string]Kind {
	return map[string]Kind{
		repb.ContentAddressableStorage_FindMissingBlobs_FullMethodName: Batch,
		repb.ContentAddressableStorage_BatchUpdateBlobs_FullMethodName: Batch,
		repb.ContentAddressableStorage_BatchReadBlobs_FullMethodName:   Batch,
		repb.ContentAddressableStorage_GetTree_FullMethodName:          Tree,
		repb.Execution_Execute_FullMethodName:                          Long,
		repb.Execution_WaitExecution_FullMethodName:                    Long,
	}
}
