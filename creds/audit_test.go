package creds_test

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/creds/credstest"
)

// TestGuard_audit_bounded: callers whom nobody knows can't fill the disk by the audit
// log, nor hide by that what others do.
func TestGuard_audit_bounded(t *testing.T) {
	log := &lines{}
	s := serve(t, creds.Options{
		Policy: credstest.Write(t, t.TempDir(), "policy.yaml", usual()), Audit: slog.New(slog.NewJSONHandler(log, nil)),
	}, creds.ServerTLS{}, &service{})
	nobody := s.dialWith(t)
	ci := s.dialWith(t, grpc.WithPerRPCCredentials(header("Bearer "+ciToken)))
	start := time.Now()
	for range 400 {
		_ = update("main")(t.Context(), nobody)
	}
	// As long as this takes more are recorded, 10 a second.
	if n, most := strings.Count(log.String(), "\n"), 101+int(10*time.Since(start).Seconds()); n > most {
		t.Errorf("400 refused calls of nobody made %d records, want %d at most", n, most)
	}
	if err := update(strings.Repeat("x", 1<<20))(t.Context(), ci); status.Code(err) != codes.PermissionDenied {
		t.Fatal(err)
	}
	for range 300 {
		if err := update("main")(t.Context(), ci); err != nil {
			t.Fatal(err)
		}
	}
	if n := strings.Count(log.String(), `"code":"OK"`); n != 300 {
		t.Errorf("%d of 300 results that were set have a record", n)
	}
	if !strings.Contains(log.String(), `"left_out":`) {
		t.Error("nobody says that records were left out")
	}
	for line := range strings.Lines(log.String()) {
		if len(line) > 4<<10 {
			t.Errorf("a record has %d bytes", len(line))
		}
	}
}

// TestAuditLog_rotated: a file that was moved away is begun anew, and nothing is lost.
func TestAuditLog_rotated(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	log, closeLog, err := creds.AuditLog(path)
	if err != nil {
		t.Fatal(err)
	}
	log.Info("first")
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	n := 0
	for ; t.Context().Err() == nil; n++ {
		log.Info("more")
		if _, err := os.Stat(path); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond) // files are looked at once a second
	}
	log.Info("last")
	if err := closeLog(); err != nil {
		t.Error(err)
	}
	old, err := os.ReadFile(path + ".1")
	if err != nil {
		t.Fatal(err)
	}
	renewed, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := bytes.Count(old, []byte("more")) + bytes.Count(renewed, []byte("more")); got != n+1 || !bytes.Contains(renewed, []byte("last")) {
		t.Errorf("%d of %d records are there, and in the new file\n%s", got, n+1, renewed)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the new file: %v, %v", info.Mode(), err)
	}
}

// TestGuard_audit_method: methods that nobody has have names of any length, and their
// calls are recorded as those of administrators are.
func TestGuard_audit_method(t *testing.T) {
	log := &lines{}
	g, err := creds.New(creds.Options{
		Policy: credstest.Write(t, t.TempDir(), "policy.yaml", usual()), Audit: slog.New(slog.NewJSONHandler(log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	err = g.Admit(t.Context(), "/"+strings.Repeat("x", 60<<10)+"/y")
	if got := log.String(); status.Code(err) != codes.PermissionDenied || strings.Count(got, "\n") != 1 || len(got) > 4<<10 {
		t.Errorf("%d bytes are recorded of %v", len(got), status.Code(err))
	}
	if n := len(status.Convert(err).Message()); n > 1<<10 {
		t.Errorf("the error has %d bytes", n)
	}
}
