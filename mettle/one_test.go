package main

import (
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	spb "google.golang.org/genproto/googleapis/rpc/status"
)

func TestWhy(t *testing.T) {
	for _, tc := range []struct{ name, status, message, want string }{
		{
			"a note", "execution timeout exceeded", "timeout: the command ran for longer than 2s and was killed\nRan on worker a.",
			"execution timeout exceeded: timeout: the command ran for longer than 2s and was killed",
		},
		{"no note", "no such image", "Ran on worker a.", "no such image"},
		{"no message", "no such image", "", "no such image"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := why(&repb.ExecuteResponse{Status: &spb.Status{Code: 4, Message: tc.status}, Message: tc.message})
			if got != tc.want {
				t.Errorf("%q, want %q", got, tc.want)
			}
		})
	}
}
