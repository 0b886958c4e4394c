package deploy_test

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// compose is what of a compose file is used here.
type compose struct {
	Name     string                    `yaml:"name"`
	Services map[string]composeService `yaml:"services"`
	Volumes  map[string]struct{}       `yaml:"volumes"`
}

type composeService struct {
	Image string `yaml:"image"`
	Build struct {
		Context    string            `yaml:"context"`
		Dockerfile string            `yaml:"dockerfile"`
		Args       map[string]string `yaml:"args"`
	} `yaml:"build"`
	Command         []string `yaml:"command"`
	Ports           []string `yaml:"ports"`
	Volumes         []string `yaml:"volumes"`
	DependsOn       []string `yaml:"depends_on"`
	ReadOnly        bool     `yaml:"read_only"`
	Tmpfs           []string `yaml:"tmpfs"`
	CapDrop         []string `yaml:"cap_drop"`
	SecurityOpt     []string `yaml:"security_opt"`
	StopGracePeriod string   `yaml:"stop_grace_period"`
	Restart         string   `yaml:"restart"`
}

func TestCompose(t *testing.T) {
	var c compose
	decode(t, "compose.yaml", read(t, "compose.yaml"), &c)
	if got, want := slices.Sorted(maps.Keys(c.Services)), []string{"api", "elan", "nats", "setup", "worker"}; !slices.Equal(got, want) {
		t.Fatalf("got services %v, want %v", got, want)
	}
	for name, s := range c.Services {
		for _, v := range s.Volumes {
			volume, _, _ := strings.Cut(v, ":")
			if _, ok := c.Volumes[volume]; !ok {
				t.Errorf("%s: there is no volume %s", name, volume)
			}
		}
		for _, d := range s.DependsOn {
			if _, ok := c.Services[d]; !ok {
				t.Errorf("%s: there is no service %s", name, d)
			}
		}
		for _, p := range s.Ports {
			if !strings.HasPrefix(p, "127.0.0.1:") {
				t.Errorf("%s: %s is open to other machines, and nobody is asked who he is", name, p)
			}
		}
		if name == "nats" {
			continue
		}
		if _, err := os.Stat(filepath.Join(s.Build.Context, s.Build.Dockerfile)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !s.ReadOnly || !slices.Contains(s.CapDrop, "ALL") || !slices.Contains(s.SecurityOpt, "no-new-privileges:true") {
			t.Errorf("%s has more rights than it needs", name)
		}
		binary := "mettle"
		if name == "elan" {
			binary = "elan"
		}
		set := checkArguments(t, "compose.yaml, "+name, binary, s.Command)
		if q, ok := set["--queue"]; ok && q != "nats://nats:4222/mettle" {
			t.Errorf("%s: got the queue %s, want that of the others", name, q)
		}
		if q, ok := set["--storage"]; ok && name != "elan" && q != "elan:"+portOf(t, "elan", "serve", "--port") {
			t.Errorf("%s: %s is not where elan listens", name, q)
		}
		if name == "api" && !slices.Contains(s.Ports, "127.0.0.1:7778:"+portOf(t, "mettle", "api", "--port")) {
			t.Errorf("api: got ports %v, without the one that it listens on", s.Ports)
		}
	}
}
