// Package deploy_test holds what is below deploy to the programs: manifests are
// built and read strictly, their flags, ports and names compared with what there
// is, and images made of the files of the Dockerfiles, without an engine, and run.
package deploy_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.yaml.in/yaml/v3"
)

// programs builds both programs once, static, as the Dockerfiles do.
//
//nolint:gochecknoglobals // built once for all tests
var programs = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "deploy-programs-")
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(context.Background(), "go", "build", "-trimpath", "-o", dir+"/", "./mettle", "./elan")
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return dir, &buildError{string(out), err}
	}
	return dir, nil
})

type buildError struct {
	out string
	err error
}

func (e *buildError) Error() string { return e.err.Error() + ": " + e.out }

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, _ := programs(); dir != "" {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}

// program is the path of one of ours.
func program(t *testing.T, name string) string {
	t.Helper()
	dir, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, name)
}

// help is what a command says of its flags and variables, all in one line.
func help(t *testing.T, name, command string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), program(t, name), command, "--help").CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s --help: %v: %s", name, command, err, out)
	}
	return strings.Join(strings.Fields(string(out)), " ")
}

var argument = regexp.MustCompile(`^(--[a-z_]+)(=(.*))?$`)

// checkArguments holds a command line to the flags that the command has, and
// returns what it sets.
func checkArguments(t *testing.T, where, name string, args []string) map[string]string {
	t.Helper()
	if len(args) == 0 || strings.HasPrefix(args[0], "-") {
		t.Fatalf("%s: %q names no command of %s", where, args, name)
	}
	text, set := help(t, name, args[0]), make(map[string]string)
	for _, a := range args[1:] {
		m := argument.FindStringSubmatch(a)
		if m == nil {
			t.Errorf("%s: %q is no flag", where, a)
			continue
		}
		if !regexp.MustCompile(regexp.QuoteMeta(m[1]) + `[ =]`).MatchString(text) {
			t.Errorf("%s: %s %s has no flag %s", where, name, args[0], m[1])
		}
		set[m[1]] = m[3]
	}
	return set
}

// checkVariables holds the environment that is for our programs to what they read.
func checkVariables(t *testing.T, where, name, command string, variables []string) {
	t.Helper()
	text := help(t, name, command)
	for _, v := range variables {
		if ours := strings.HasPrefix(v, "METTLE_") || strings.HasPrefix(v, "ELAN_"); ours && !strings.Contains(text, "$"+v+")") {
			t.Errorf("%s: %s %s does not read %s", where, name, command, v)
		}
	}
}

// decode reads YAML strictly: an unknown field is an error.
func decode(t *testing.T, where string, data []byte, to any) {
	t.Helper()
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	if err := d.Decode(to); err != nil && !errors.Is(err, io.EOF) {
		t.Fatalf("%s: %v", where, err)
	}
}

// read is a file below deploy.
func read(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// portOf is the port that a command listens on by a flag, by what its help says.
func portOf(t *testing.T, name, command, flag string) string {
	t.Helper()
	m := regexp.MustCompile(flag + `=(\d+)`).FindStringSubmatch(help(t, name, command))
	if m == nil {
		return ""
	}
	return m[1]
}

// TestSystemd holds the units to the directives that systemd 252 knows, and their
// commands to the programs.
func TestSystemd(t *testing.T) {
	known := map[string][]string{
		"Unit":    {"Description", "Documentation", "Wants", "After"},
		"Install": {"WantedBy"},
		"Service": {
			"ExecStart", "EnvironmentFile", "User", "Group", "CacheDirectory", "Delegate", "KillMode", "TimeoutStopSec", "Restart", "RestartSec",
			"LimitNOFILE", "TasksMax", "NoNewPrivileges", "ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices", "ProtectKernelTunables",
			"ProtectKernelModules", "ProtectControlGroups", "RestrictSUIDSGID", "LockPersonality", "RestrictAddressFamilies", "CapabilityBoundingSet",
			"ProtectClock", "ProtectKernelLogs", "ProtectHostname", "ProtectProc", "RemoveIPC", "RestrictNamespaces", "RestrictRealtime",
			"MemoryDenyWriteExecute", "SystemCallArchitectures", "SystemCallFilter", "SystemCallErrorNumber", "UMask",
		},
	}
	units, err := filepath.Glob("systemd/*.service")
	if err != nil || len(units) != 4 {
		t.Fatalf("got units %v, %v, want 4", units, err)
	}
	for _, unit := range units {
		section, values := "", map[string]string{}
		for line := range strings.Lines(string(read(t, unit))) {
			line = strings.TrimSpace(line)
			switch key, value, isPair := strings.Cut(line, "="); {
			case line == "" || line[0] == '#':
			case line[0] == '[':
				section = strings.Trim(line, "[]")
			case !isPair || !slices.Contains(known[section], key):
				t.Errorf("%s: [%s] has no %q", unit, section, line)
			default:
				values[key] = value
			}
		}
		command := strings.Fields(values["ExecStart"])
		if len(command) < 2 {
			t.Errorf("%s: ExecStart=%q starts nothing", unit, values["ExecStart"])
			continue
		}
		set := checkArguments(t, unit, filepath.Base(command[0]), command[1:])
		if _, works := set["--sandbox"]; works && (values["Delegate"] != "yes" || values["TimeoutStopSec"] != "11min" || set["--drain_timeout"] != "10m") {
			t.Errorf("%s: runs actions, with Delegate=%s, TimeoutStopSec=%s and --drain_timeout=%s", unit, values["Delegate"], values["TimeoutStopSec"], set["--drain_timeout"])
		}
	}
	verifier, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Log("no systemd-analyze here, which would have read the units too")
		return
	}
	// It also says that there is no such program or user here.
	out, _ := exec.CommandContext(t.Context(), verifier, append([]string{"verify"}, units...)...).CombinedOutput()
	for _, bad := range []string{"Unknown", "ignoring", "Failed to parse"} {
		if bytes.Contains(out, []byte(bad)) {
			t.Errorf("systemd-analyze verify: %s", out)
		}
	}
}
