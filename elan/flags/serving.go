package flags

import (
	"fmt"

	"github.com/mettle-build/mettle/elan/action"
)

// Serving are the flags of the commands that serve blobs and results, for them to
// embed: what is taken from clients, and what they see of each other.
type Serving struct {
	MaxBlobSize      Size                `help:"The largest blob that clients may upload, as in 4GiB. 0: what the store holds." default:"0"`
	MaxBatchSize     Size                `help:"How much the blobs of one batch may have, at most 15.5MiB; clients must take messages half a MiB larger. 0: 3.5MiB, which all take." default:"0"`
	ACUpdate         action.UpdatePolicy `name:"ac_update" help:"Whose results clients may set by UpdateActionResult: everyone, nobody, or instances:NAME,NAME. What is executed here is cached in any case. Bazel stops at a refusal: give it --noremote_upload_local_results then." default:"everyone"`
	IsolateInstances bool                `help:"Keep the blobs of instances apart, so that nobody can read by a hash, or find, what another instance has. What the store has from before is seen by none."`
	LogMemory        Size                `name:"log_memory" help:"How much memory log streams may take: what actions print while they run, for those who want to watch, and for ten minutes after. 0: there are none." default:"64MiB"`
}

// Check is for the commands' Validate. Batches may have maxBatch bytes at most.
func (s Serving) Check(maxBatch int64) error {
	if int64(s.MaxBatchSize) > maxBatch {
		return fmt.Errorf("--max_batch_size: %d bytes, at most %d are possible", int64(s.MaxBatchSize), maxBatch)
	}
	return nil
}
