//go:build linux

package worker

import (
	"errors"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/mettle/worker/runner"
	workerpb "github.com/mettle-build/mettle/proto/worker"
)

// Names of what is in auxiliary_metadata: ours, and one that other programs know.
const (
	usageURL = "type.googleapis.com/mettle.worker.v1.ResourceUsage"
	posixURL = "type.googleapis.com/buildbarn.resourceusage.POSIXResourceUsage"
)

// exitKilled is the exit code of a command that a limit ended: 128 and SIGKILL.
const exitKilled = 137

// endings are the limits whose end of a command is a result of it: another attempt
// would end the same way, so nobody is to make one.
func endings() map[error]workerpb.ResourceUsage_Ended {
	return map[error]workerpb.ResourceUsage_Ended{
		runner.ErrOutOfMemory: workerpb.ResourceUsage_OUT_OF_MEMORY,
		runner.ErrDiskQuota:   workerpb.ResourceUsage_DISK_QUOTA,
	}
}

// endedBy is which of endings err is.
func endedBy(err error) workerpb.ResourceUsage_Ended {
	if err == nil {
		return workerpb.ResourceUsage_BY_ITSELF
	}
	for sentinel, ended := range endings() {
		if errors.Is(err, sentinel) {
			return ended
		}
	}
	return workerpb.ResourceUsage_BY_ITSELF
}

// addUsage puts what a command used, and which limit ended it, into its metadata.
func addUsage(m *repb.ExecutedActionMetadata, u *runner.Usage, limits *runner.Limits, ended workerpb.ResourceUsage_Ended) {
	for _, a := range []struct {
		url string
		m   proto.Message
	}{
		{posixURL, &workerpb.POSIXResourceUsage{
			UserTime:                   durationpb.New(u.UserTime),
			SystemTime:                 durationpb.New(u.SystemTime),
			MaximumResidentSetSize:     u.MaxRSSBytes,
			PageReclaims:               u.MinorFaults,
			PageFaults:                 u.MajorFaults,
			BlockInputOperations:       u.BlockInputs,
			BlockOutputOperations:      u.BlockOutputs,
			VoluntaryContextSwitches:   u.VoluntarySwitches,
			InvoluntaryContextSwitches: u.ForcedSwitches,
		}},
		{usageURL, &workerpb.ResourceUsage{
			PeakMemoryBytes:  u.PeakMemoryBytes,
			Ended:            ended,
			MemoryLimitBytes: limits.MemoryBytes,
			CpuLimit:         limits.CPUs,
			ProcessLimit:     int64(limits.Processes),
			DiskLimitBytes:   limits.DiskBytes,
		}},
	} {
		if data, err := proto.Marshal(a.m); err == nil { // there is nothing in them that could fail
			m.AuxiliaryMetadata = append(m.AuxiliaryMetadata, &anypb.Any{TypeUrl: a.url, Value: data})
		}
	}
}

// usageIn is what addUsage has put into a response; nil where nothing has run.
func usageIn(resp *repb.ExecuteResponse) *workerpb.ResourceUsage {
	for _, a := range resp.GetResult().GetExecutionMetadata().GetAuxiliaryMetadata() {
		if a.GetTypeUrl() == usageURL {
			u := &workerpb.ResourceUsage{}
			if proto.Unmarshal(a.GetValue(), u) == nil {
				return u
			}
		}
	}
	return nil
}
