package main

import "testing"

// TestOperations_remote: the server is named as by the other commands, and as it was.
func TestOperations_remote(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		env  map[string]string
		want string
	}{
		"by default":          {nil, nil, "localhost:7778"},
		"remote":              {[]string{"--remote=a:1"}, nil, "a:1"},
		"api":                 {[]string{"--api=a:1"}, nil, "a:1"},
		"METTLE_REMOTE":       {nil, map[string]string{"METTLE_REMOTE": "a:1"}, "a:1"},
		"METTLE_API":          {nil, map[string]string{"METTLE_API": "a:1"}, "a:1"},
		"a flag and variable": {[]string{"--api=a:1"}, map[string]string{"METTLE_REMOTE": "b:1"}, "a:1"},
	} {
		t.Run(name, func(t *testing.T) {
			for k, v := range tc.env {
				t.Setenv(k, v)
			}
			if got := parsed(t, append([]string{"operations", "list"}, tc.args...)...).Ops.Remote; got != tc.want {
				t.Errorf("%q, want %q", got, tc.want)
			}
		})
	}
}
