// Command manifests reads Kubernetes objects from its standard input, as kustomize
// builds them, and does with each what an API server does before it stores one: it
// decodes it strictly, sets the defaults, and validates it, by Kubernetes' own code.
// It prints each object with the strictest level of Pod Security that its pods keep
// to, and what Kubernetes warns of, and ends with 1 where one would be refused or
// lose a field. TestKubernetes_accepted in deploy runs it. It is a module of its
// own, so that the product does not depend on Kubernetes.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"

	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/util/yaml"
	genericapirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/apis/apps"
	_ "k8s.io/kubernetes/pkg/apis/apps/install"
	_ "k8s.io/kubernetes/pkg/apis/autoscaling/install"
	"k8s.io/kubernetes/pkg/apis/batch"
	_ "k8s.io/kubernetes/pkg/apis/batch/install"
	"k8s.io/kubernetes/pkg/apis/core"
	_ "k8s.io/kubernetes/pkg/apis/core/install"
	corev1conversion "k8s.io/kubernetes/pkg/apis/core/v1"
	_ "k8s.io/kubernetes/pkg/apis/networking/install"
	_ "k8s.io/kubernetes/pkg/apis/policy/install"
	"k8s.io/kubernetes/pkg/capabilities"
	"k8s.io/kubernetes/pkg/registry/apps/deployment"
	"k8s.io/kubernetes/pkg/registry/autoscaling/horizontalpodautoscaler"
	"k8s.io/kubernetes/pkg/registry/batch/job"
	"k8s.io/kubernetes/pkg/registry/core/configmap"
	"k8s.io/kubernetes/pkg/registry/core/namespace"
	"k8s.io/kubernetes/pkg/registry/core/service"
	"k8s.io/kubernetes/pkg/registry/core/serviceaccount"
	"k8s.io/kubernetes/pkg/registry/networking/networkpolicy"
	"k8s.io/kubernetes/pkg/registry/policy/poddisruptionbudget"
	"k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
)

// strategies are what an API server does with an object that is to be made.
func strategies() map[string]rest.RESTCreateStrategy {
	return map[string]rest.RESTCreateStrategy{
		"ConfigMap": configmap.Strategy, "Deployment": deployment.Strategy, "Job": job.Strategy, "Namespace": namespace.Strategy,
		"HorizontalPodAutoscaler": horizontalpodautoscaler.Strategy, "NetworkPolicy": networkpolicy.Strategy,
		"PodDisruptionBudget": poddisruptionbudget.Strategy, "Service": service.Strategy, "ServiceAccount": serviceaccount.Strategy,
	}
}

func main() {
	capabilities.Setup(true, 0) // as clusters have it that allow privileged pods; Pod Security is told beside
	refused, err := run(os.Stdin, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	if refused > 0 {
		os.Exit(1)
	}
}

// run reads all objects, and returns how many of them would be refused.
func run(in io.Reader, out io.Writer) (refused int, err error) {
	levels, err := policy.NewEvaluator(policy.DefaultChecks())
	if err != nil {
		return 0, err
	}
	strict := serializer.NewCodecFactory(legacyscheme.Scheme, serializer.EnableStrict)
	decoder := strict.CodecForVersions(nil, json.NewSerializerWithOptions(json.DefaultMetaFactory, legacyscheme.Scheme, legacyscheme.Scheme,
		json.SerializerOptions{Yaml: true, Strict: true}), nil, runtime.InternalGroupVersioner)
	for r := yaml.NewYAMLReader(bufio.NewReader(in)); ; {
		text, err := r.Read()
		if errors.Is(err, io.EOF) {
			return refused, nil
		}
		if err != nil {
			return refused, err
		}
		obj, kind, err := decoder.Decode(text, nil, nil)
		if err != nil {
			refused++
			fmt.Fprintf(out, "refused: %v\n", err)
			continue
		}
		name, err := check(out, kind.Kind, obj, levels)
		if err != nil {
			refused++
			fmt.Fprintf(out, "%s/%s refused: %v\n", kind.Kind, name, err)
		}
	}
}

// check takes an object for one that somebody wants to make, and prints what
// becomes of it unless it is refused.
func check(out io.Writer, kind string, obj runtime.Object, levels policy.Evaluator) (name string, err error) {
	m, err := meta.Accessor(obj)
	if err != nil {
		return "", err
	}
	s, ok := strategies()[kind]
	if !ok {
		return m.GetName(), errors.New("this program knows no such kind")
	}
	if s.NamespaceScoped() && m.GetNamespace() == "" {
		m.SetNamespace("default")
	}
	ctx := genericapirequest.WithNamespace(genericapirequest.NewContext(), m.GetNamespace())
	if o, ok := obj.(*core.Service); ok && o.Spec.ClusterIP != "" {
		o.Spec.ClusterIPs = []string{o.Spec.ClusterIP} // as an API server's storage does
	}
	rest.FillObjectMetaSystemFields(m)
	before := template(obj.DeepCopyObject())
	if err := rest.BeforeCreate(s, ctx, obj); err != nil {
		return m.GetName(), err
	}
	after := template(obj)
	if after != nil && !apiequality.Semantic.DeepEqual(before.Spec, after.Spec) {
		return m.GetName(), errors.New("it loses fields that this version has turned off")
	}
	level := ""
	if after != nil {
		if level, err = levelOf(after, levels); err != nil {
			return m.GetName(), err
		}
	}
	fmt.Fprintf(out, "%s/%s %s\n", kind, m.GetName(), level)
	for _, w := range s.WarningsOnCreate(ctx, obj) {
		fmt.Fprintf(out, "%s/%s warning: %s\n", kind, m.GetName(), w)
	}
	return m.GetName(), nil
}

// template is that of the pods which an object makes. nil: it makes none.
func template(obj runtime.Object) *core.PodTemplateSpec {
	switch o := obj.(type) {
	case *apps.Deployment:
		return &o.Spec.Template
	case *batch.Job:
		return &o.Spec.Template
	}
	return nil
}

// levelOf is the strictest level of Pod Security that takes such pods.
func levelOf(t *core.PodTemplateSpec, levels policy.Evaluator) (string, error) {
	var pod corev1.PodTemplateSpec
	if err := corev1conversion.Convert_core_PodTemplateSpec_To_v1_PodTemplateSpec(t, &pod, nil); err != nil {
		return "", err
	}
	for _, level := range []api.Level{api.LevelRestricted, api.LevelBaseline} {
		results := levels.EvaluatePod(api.LevelVersion{Level: level, Version: api.LatestVersion()}, &pod.ObjectMeta, &pod.Spec)
		if policy.AggregateCheckResults(results).Allowed {
			return string(level), nil
		}
	}
	return string(api.LevelPrivileged), nil
}
