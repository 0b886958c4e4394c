package creds_test

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/creds/credstest"
)

// TestGuard_smuggled: headers that one reader could take for another caller's than the
// next.
func TestGuard_smuggled(t *testing.T) {
	s := serve(t, creds.Options{Policy: credstest.Write(t, t.TempDir(), "policy.yaml", usual())}, creds.ServerTLS{}, &service{})
	c := s.dialWith(t)
	for name, headers := range map[string][]string{
		"two tokens":              {"authorization", "Bearer " + ciToken, "authorization", "Bearer " + rootToken},
		"two of one name":         {"authorization", "Bearer " + ciToken, "Authorization", "Bearer " + ciToken},
		"two in one":              {"authorization", "Bearer " + ciToken + ", Bearer " + rootToken},
		"an empty one and a good": {"authorization", "", "authorization", "Bearer " + ciToken},
		"no scheme":               {"authorization", ciToken},
		"a scheme alone":          {"authorization", "Bearer"},
		"a part of a token":       {"authorization", "Bearer " + ciToken[:len(ciToken)-1]},
		"a token and more":        {"authorization", "Bearer " + ciToken + " " + rootToken},
	} {
		t.Run(name, func(t *testing.T) {
			err := find("main")(metadata.AppendToOutgoingContext(t.Context(), headers...), c)
			if status.Code(err) != codes.Unauthenticated || strings.Contains(err.Error(), ciToken[:10]) {
				t.Errorf("got %v, want UNAUTHENTICATED without the token", err)
			}
		})
	}
	for _, other := range []string{"proxy-authorization", "x-authorization", "authorization-bin"} {
		err := find("main")(metadata.AppendToOutgoingContext(t.Context(), other, "Bearer "+ciToken), c)
		if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "anonymous") {
			t.Errorf("a token in %s: %v, want what anonymous callers get", other, err)
		}
	}
}
