//go:build linux

package cgroup

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzInside: whatever a group's files hold, what a command used is not negative.
func FuzzInside(f *testing.F) {
	f.Add("4096\n", "oom 1\noom_kill 2\n", "user_usec 5\nsystem_usec 6\n", "100\n")
	f.Add("max", "oom_kill -7\noom", "user_usec x\n", "-1")
	f.Add("9223372036854775807\n", "oom_kill 9223372036854775807\n", "user_usec 9223372036854775807\n", "-9223372036854775808")
	open := func(t *testing.T, text string) int {
		fd, err := unix.MemfdCreate("text", unix.MFD_CLOEXEC)
		if err != nil {
			t.Skip("no file in memory:", err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if _, err := unix.Write(fd, []byte(text)); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	f.Fuzz(func(t *testing.T, memory, events, cpu, before string) {
		in := &Inside{into: -1, limit: 1 << 20, uncounted: len(cpu)%2 == 0, files: map[role]int{
			roleUsage: open(t, before), roleEvents: open(t, before), roleCPU: open(t, before),
		}}
		if len(events)%2 == 0 {
			in.files[roleAllTimePeak] = in.files[roleUsage]
		}
		in.Begin()
		in.files[roleUsage], in.files[roleEvents], in.files[roleCPU], in.files[roleForks] = open(t, memory), open(t, events), open(t, cpu), open(t, events)
		in.Sample()
		u := in.End()
		if u.PeakMemoryBytes < 0 || u.User < 0 || u.System < 0 || u.Killed < 0 || u.Refused < 0 {
			t.Errorf("%+v", u)
		}
	})
}

// FuzzTake: what is handed over is taken or refused.
func FuzzTake(f *testing.F) {
	f.Add("")
	f.Add(`{"MemoryBytes":7,"Roles":["join","into","usage"]}`)
	f.Add(`{"Roles":"x"}`)
	f.Fuzz(func(t *testing.T, text string) {
		in, err := Take(text, 1000)
		if err == nil && strings.TrimSpace(text) == "" && (len(in.files) != 0 || in.into != -1) {
			t.Errorf("%q is read as %+v", text, in)
		}
		if err != nil && in != nil {
			t.Errorf("%q: %+v with %v", text, in, err)
		}
	})
}
