package deploy_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"

	"github.com/mettle-build/mettle/creds/credstest"
)

// What operators make by hand, as kubernetes/README.md says: it is in no file.
// The keys are those that are mounted.
func secrets() map[string][]string {
	return map[string][]string{
		"elan-tls":       {"tls.crt", "tls.key", "ca.crt"},
		"mettle-api-tls": {"tls.crt", "tls.key"},
		"mettle-clients": {"ci", "operators"},
		"mettle-callers": {"api", "worker"},
		"mettle-nats":    {"api.creds", "worker.creds", "setup.creds", "ca.crt"},
		"elan-s3":        {"credentials"},
	}
}

// cluster is what a kustomization builds, by kind and name.
type cluster map[string]object

func (c cluster) kind(kind string) []object {
	var found []object
	for _, key := range slices.Sorted(maps.Keys(c)) {
		if c[key].Kind == kind {
			found = append(found, c[key])
		}
	}
	return found
}

// kustomize builds an overlay with the kustomize module.
func kustomize(t *testing.T, fs filesys.FileSystem, dir string) []byte {
	t.Helper()
	res, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(fs, dir)
	if err != nil {
		t.Fatalf("kustomize build %s: %v", dir, err)
	}
	text, err := res.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// build builds an overlay, and reads all strictly.
func build(t *testing.T, fs filesys.FileSystem, dir string) cluster {
	t.Helper()
	c := cluster{}
	d := yaml.NewDecoder(bytes.NewReader(kustomize(t, fs, dir)))
	for {
		var node yaml.Node
		if err := d.Decode(&node); errors.Is(err, io.EOF) {
			return c
		} else if err != nil {
			t.Fatalf("%s: %v", dir, err)
		}
		one, err := yaml.Marshal(&node)
		if err != nil {
			t.Fatal(err)
		}
		var head struct {
			Kind string `yaml:"kind"`
		}
		if err := yaml.Unmarshal(one, &head); err != nil {
			t.Fatal(err)
		}
		var o object
		where := dir + ", a " + head.Kind
		switch head.Kind {
		case "Deployment", "Job":
			var w workload
			decode(t, where, one, &w)
			o = object{Header: w.Header, workload: &w}
		case "Service":
			var s service
			decode(t, where, one, &s)
			o = object{Header: s.Header, service: &s}
		case "NetworkPolicy":
			var n networkPolicy
			decode(t, where, one, &n)
			o = object{Header: n.Header, network: &n}
		case "PodDisruptionBudget":
			var b budget
			decode(t, where, one, &b)
			o = object{Header: b.Header, budget: &b}
		case "ConfigMap", "ServiceAccount", "Namespace":
			var p plain
			decode(t, where, one, &p)
			o = object{Header: p.Header, data: p.Data}
		default:
			t.Fatalf("%s: this test knows no %s", dir, head.Kind)
		}
		if want := apiVersions()[o.Kind]; o.APIVersion != want {
			t.Errorf("%s %s: got apiVersion %s, want %s", o.Kind, o.Metadata.Name, o.APIVersion, want)
		}
		if o.Kind != "Namespace" && o.Metadata.Namespace != "mettle" {
			t.Errorf("%s %s is in the namespace %q", o.Kind, o.Metadata.Name, o.Metadata.Namespace)
		}
		c[o.Kind+"/"+o.Metadata.Name] = o
	}
}

func TestKubernetes(t *testing.T) {
	for _, overlay := range []string{"gcp", "nats-s3"} {
		t.Run(overlay, func(t *testing.T) {
			c := buildOverlay(t, overlay)
			for _, w := range append(c.kind("Deployment"), c.kind("Job")...) {
				t.Run(w.Metadata.Name, func(t *testing.T) { checkWorkload(t, c, w.workload) })
			}
			checkSelectors(t, c)
		})
	}
}

// withPrivileged is a kustomization of the overlay gcp with the fallback for workers.
func withPrivileged(t *testing.T, fs filesys.FileSystem) (dir string) {
	t.Helper()
	dir = t.TempDir()
	base, component := absolute(t, "kubernetes/overlays/gcp"), absolute(t, "kubernetes/components/privileged-worker")
	// kustomize takes relative paths only.
	text := fmt.Sprintf("resources: [%s]\ncomponents: [%s]\n", relative(t, dir, base), relative(t, dir, component))
	if err := fs.WriteFile(dir+"/kustomization.yaml", []byte(text)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestKubernetes_privileged holds the fallback for workers to what it says.
func TestKubernetes_privileged(t *testing.T) {
	fs := filesys.MakeFsOnDisk()
	c := build(t, fs, withPrivileged(t, fs))
	pod := c["Deployment/mettle-worker-default"].workload.Spec.Template.Spec
	if pod.HostUsers != nil || !pod.Containers[0].SecurityContext.Privileged || pod.SecurityContext.RunAsNonRoot {
		t.Errorf("got a worker that is not privileged: %+v", pod)
	}
	if c["Deployment/elan"].workload.Spec.Template.Spec.Containers[0].SecurityContext.Privileged {
		t.Error("elan is privileged too")
	}
}

func checkWorkload(t *testing.T, c cluster, w *workload) {
	pod := w.Spec.Template.Spec
	k := pod.Containers[0]
	where := w.Metadata.Name
	binary := "mettle"
	if k.Name == "elan" {
		binary = "elan"
	}
	set := checkArguments(t, where, binary, k.Args)
	var variables []string
	for _, e := range k.EnvFrom {
		m, ok := c["ConfigMap/"+e.ConfigMapRef.Name]
		if !ok {
			t.Errorf("there is no ConfigMap %s", e.ConfigMapRef.Name)
		}
		variables = append(variables, slices.Collect(maps.Keys(m.data))...)
	}
	checkVariables(t, where, binary, k.Args[0], variables)
	if a := pod.ServiceAccountName; a != "" && c["ServiceAccount/"+a].Kind == "" {
		t.Errorf("there is no ServiceAccount %s", a)
	}
	checkPorts(t, w, binary)
	checkFiles(t, c, pod, set)
	checkRights(t, w)
	if host, port, ok := strings.Cut(strings.TrimPrefix(set["--storage"], "dns:///"), ":"); ok {
		s := c["Service/"+strings.TrimSuffix(host, ".mettle.svc")].service
		if s == nil || fmt.Sprint(s.Spec.Ports[0].Port) != port || set["--storage_tls_server_name"] != host {
			t.Errorf("--storage=%s is of no Service, or is not whom its certificate names", set["--storage"])
		}
	}
	if d := set["--drain_timeout"]; d != "" {
		drain, err := time.ParseDuration(d)
		if err != nil || time.Duration(pod.TerminationGracePeriodSeconds)*time.Second < drain+20*time.Second {
			t.Errorf("a drain of %s in a grace of %d s (%v)", d, pod.TerminationGracePeriodSeconds, err)
		}
	}
}

// checkPorts holds ports and probes to what the program listens on.
func checkPorts(t *testing.T, w *workload, binary string) {
	k := w.Spec.Template.Spec.Containers[0]
	ports := map[string]string{}
	for _, p := range k.Ports {
		ports[p.Name] = fmt.Sprint(p.ContainerPort)
	}
	for name, flag := range map[string]string{"grpc": "--port", "http": "--http_port"} {
		if got, want := ports[name], portOf(t, binary, k.Args[0], flag); got != want {
			t.Errorf("%s: got port %s %q, want %q by %s", w.Metadata.Name, name, got, want, flag)
		}
	}
	if w.Kind == "Job" {
		return
	}
	for _, p := range []probe{k.LivenessProbe, k.ReadinessProbe} {
		if ports[p.HTTPGet.Port+p.TCPSocket.Port] == "" {
			t.Errorf("%s: a probe of no port: %+v", w.Metadata.Name, p)
		}
	}
	if k.LivenessProbe.HTTPGet.Path != "/healthz" {
		t.Errorf("%s: got liveness by %q: what it waits for is no reason to be killed", w.Metadata.Name, k.LivenessProbe.HTTPGet.Path)
	}
	if ports["grpc"] != "" && k.ReadinessProbe.TCPSocket.Port != "grpc" {
		t.Errorf("%s: readiness is by what it waits for, so that all servers go at once", w.Metadata.Name)
	}
}

// checkFiles holds each file that a flag names to a mounted key, and each mounted
// key to a ConfigMap of the kustomization or a Secret of the operator's.
func checkFiles(t *testing.T, c cluster, pod podSpec, set map[string]string) {
	k := pod.Containers[0]
	files, below := map[string]bool{}, []string{}
	for _, m := range k.VolumeMounts {
		i := slices.IndexFunc(pod.Volumes, func(v volume) bool { return v.Name == m.Name })
		if i < 0 {
			t.Errorf("there is no volume %s", m.Name)
			continue
		}
		v := pod.Volumes[i]
		items, keys := v.Secret.Items, secrets()[v.Secret.SecretName]
		switch {
		case v.ConfigMap.Name != "":
			items, keys = v.ConfigMap.Items, slices.Collect(maps.Keys(c["ConfigMap/"+v.ConfigMap.Name].data))
		case v.EmptyDir != nil:
			below = append(below, m.MountPath)
			continue
		}
		if len(items) == 0 {
			for _, key := range keys {
				files[m.MountPath+"/"+key] = true
			}
		}
		for _, item := range items {
			if !slices.Contains(keys, item.Key) {
				t.Errorf("volume %s: there is no key %s", v.Name, item.Key)
			}
			files[m.MountPath+"/"+item.Path] = true
		}
		if len(keys) == 0 {
			t.Errorf("volume %s: there is nothing in %+v", v.Name, v)
		}
	}
	named := regexp.MustCompile(`/run/mettle/[a-z0-9./-]+`)
	text := fmt.Sprint(set)
	for _, e := range k.EnvFrom {
		text += fmt.Sprint(c["ConfigMap/"+e.ConfigMapRef.Name].data)
	}
	if p := set["--policy"]; p != "" {
		for name, m := range c {
			if strings.HasPrefix(name, "ConfigMap/mettle-policy") {
				text += m.data[p[strings.LastIndexByte(p, '/')+1:]]
			}
		}
	}
	for _, f := range named.FindAllString(text, -1) {
		if !files[f] {
			t.Errorf("%s is named, and not mounted", f)
		}
	}
	if d := set["--dir"]; d != "" && !slices.Contains(below, d) {
		t.Errorf("--dir=%s is on the read-only root", d)
	}
}

// checkRights holds a workload to the least that it can do with.
func checkRights(t *testing.T, w *workload) {
	pod := w.Spec.Template.Spec
	k, worker := pod.Containers[0], strings.HasPrefix(w.Metadata.Name, "mettle-worker")
	s := k.SecurityContext
	if !pod.SecurityContext.RunAsNonRoot || !s.ReadOnlyRootFilesystem || s.Privileged || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation ||
		!slices.Equal(s.Capabilities.Drop, []string{"ALL"}) || pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken {
		t.Errorf("%s may do more than it needs: %+v, %+v", w.Metadata.Name, pod.SecurityContext, s)
	}
	if inUsers := pod.HostUsers != nil && !*pod.HostUsers; inUsers != worker || (s.ProcMount == "Unmasked") != worker {
		t.Errorf("%s: hostUsers and procMount are for workers", w.Metadata.Name)
	}
	want := map[bool]string{true: "Unconfined", false: "RuntimeDefault"}[worker]
	if got := pod.SecurityContext.SeccompProfile.Type; got != want {
		t.Errorf("%s: got seccomp %s, want %s", w.Metadata.Name, got, want)
	}
	if k.Resources.Requests["memory"] == "" || k.Resources.Limits["memory"] == "" {
		t.Errorf("%s has no bounds on memory", w.Metadata.Name)
	}
	if w.Kind == "Deployment" && len(pod.TopologySpreadConstraints) == 0 {
		t.Errorf("%s may all be on one node", w.Metadata.Name)
	}
}

// checkSelectors holds whatever selects pods to the labels that there are, and the
// workers to deploy/autoscaling.
func checkSelectors(t *testing.T, c cluster) {
	matches := func(labels map[string]string) bool {
		return slices.ContainsFunc(append(c.kind("Deployment"), c.kind("Job")...), func(o object) bool {
			have := o.workload.Spec.Template.Metadata.Labels
			for k, v := range labels {
				if have[k] != v {
					return false
				}
			}
			return true
		})
	}
	var budgeted []string
	for _, o := range c {
		var selected []map[string]string
		switch {
		case o.service != nil:
			selected = append(selected, o.service.Spec.Selector)
		case o.budget != nil:
			selected = append(selected, o.budget.Spec.Selector.MatchLabels)
			budgeted = append(budgeted, o.Metadata.Name)
		case o.network != nil:
			selected = append(selected, o.network.Spec.PodSelector.MatchLabels)
			for _, e := range o.network.Spec.PodSelector.MatchExpressions {
				for _, v := range e.Values {
					selected = append(selected, map[string]string{e.Key: v})
				}
			}
			if len(o.network.Spec.Ingress) > 0 && o.network.Spec.PodSelector.MatchLabels["app.kubernetes.io/name"] == "mettle-worker" {
				t.Errorf("%s lets others connect to workers", o.Metadata.Name)
			}
		case o.workload != nil && o.Kind == "Deployment":
			selected = append(selected, o.workload.Spec.Selector.MatchLabels)
		}
		for _, labels := range selected {
			if !matches(labels) {
				t.Errorf("%s %s selects no pods: %v", o.Kind, o.Metadata.Name, labels)
			}
		}
	}
	for _, d := range c.kind("Deployment") {
		if !slices.Contains(budgeted, d.Metadata.Name) {
			t.Errorf("%s has no PodDisruptionBudget", d.Metadata.Name)
		}
	}
	for _, file := range []string{"autoscaling/hpa.yaml", "autoscaling/keda.yaml"} {
		m := regexp.MustCompile(`scaleTargetRef:(?:\n    .*)*?\n    name: (\S+)`).FindSubmatch(read(t, file))
		if m == nil || c["Deployment/"+string(m[1])].workload == nil {
			t.Errorf("%s scales %q, which is none of these", file, m)
		}
	}
}

// TestKubernetes_secretsAreDocumented: they are in no file, so the README has to
// say how each is made, with its keys.
func TestKubernetes_secretsAreDocumented(t *testing.T) {
	text := string(read(t, "kubernetes/README.md"))
	for name, keys := range secrets() {
		line := regexp.MustCompile(`(?m)^kubectl .*create secret generic ` + name + ` .*$`).FindString(text)
		for _, key := range keys {
			if !strings.Contains(line, "--from-file="+key) {
				t.Errorf("kubernetes/README.md does not say how the key %s of the Secret %s is made: %q", key, name, line)
			}
		}
	}
}

func buildOverlay(t *testing.T, name string) cluster {
	t.Helper()
	return build(t, filesys.MakeFsOnDisk(), "kubernetes/overlays/"+name)
}

// mountManifest puts into an unpacked image of elan what its pod mounts: a
// certificate, the policy as it is, and tokens.
func mountManifest(t *testing.T, root string, c cluster) {
	t.Helper()
	dir := filepath.Join(root, "run/mettle")
	for _, d := range []string{"tls", "policy", "callers"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil { //nolint:gosec // a pod's volumes are readable by its user
			t.Fatal(err)
		}
	}
	cert, key := credstest.NewAuthority(t, "site").Issue(t.TempDir(), "elan", credstest.Server())
	files := map[string][]byte{
		"tls/tls.crt": read(t, cert), "tls/tls.key": read(t, key),
		"callers/api": []byte("api-0123456789abcdef\n"), "callers/worker": []byte("worker-0123456789abcdef\n"),
	}
	for name, m := range c {
		if strings.HasPrefix(name, "ConfigMap/mettle-policy") {
			files["policy/elan.yaml"] = []byte(m.data["elan.yaml"])
		}
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil { //nolint:gosec // likewise
			t.Fatal(err)
		}
	}
}
