package deploy_test

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"

	"sigs.k8s.io/kustomize/kyaml/filesys"
)

// kubernetesVar is set where Kubernetes' own code is to read the manifests.
const kubernetesVar = "METTLE_TEST_KUBERNETES"

// TestKubernetes_accepted has the code of a Kubernetes API server decode, default and
// validate what the overlays make, and say which level of Pod Security it keeps to.
// third_party/manifests is that code; it takes minutes to be built.
func TestKubernetes_accepted(t *testing.T) {
	if os.Getenv(kubernetesVar) == "" {
		t.Skip(kubernetesVar + " is not set: make manifests")
	}
	fs := filesys.MakeFsOnDisk()
	usual := []string{"Deployment/elan restricted", "Deployment/mettle-api restricted", "Deployment/mettle-worker-default privileged"}
	for name, c := range map[string]struct {
		text []byte
		want []string
	}{
		"gcp":        {kustomize(t, fs, absolute(t, "kubernetes/overlays/gcp")), usual},
		"nats-s3":    {kustomize(t, fs, absolute(t, "kubernetes/overlays/nats-s3")), append([]string{"Job/mettle-setup restricted"}, usual...)},
		"privileged": {kustomize(t, fs, withPrivileged(t, fs)), usual},
		"hpa":        {read(t, "autoscaling/hpa.yaml"), []string{"HorizontalPodAutoscaler/mettle-worker-default"}},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := accept(t, c.text)
			if err != nil || strings.Contains(out, "warning") {
				t.Errorf("%v:\n%s", err, out)
			}
			for _, line := range c.want {
				if !strings.Contains("\n"+out, "\n"+line) {
					t.Errorf("got no line %q:\n%s", line, out)
				}
			}
		})
	}
	// What has a mistake is refused.
	text := bytes.ReplaceAll(kustomize(t, fs, absolute(t, "kubernetes/overlays/gcp")), []byte("hostUsers: false"), []byte("hostUsers: true"))
	if out, err := accept(t, text); err == nil || !strings.Contains(out, "`hostUsers` must be false") {
		t.Errorf("an unmasked /proc with the users of the node: %v:\n%s", err, out)
	}
}

func accept(t *testing.T, text []byte) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "run", ".")
	cmd.Dir, cmd.Stdin = "../third_party/manifests", bytes.NewReader(text)
	out, err := cmd.CombinedOutput()
	return string(out), err
}
