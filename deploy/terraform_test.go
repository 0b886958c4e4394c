package deploy_test

import (
	"bytes"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/hcl/v2/hclwrite"
)

// TestTerraform reads all files, holds them to `terraform fmt`, and each reference
// to what is declared. Providers' schemas are not here, so arguments are not checked.
func TestTerraform(t *testing.T) {
	files, err := filepath.Glob("terraform/gcp/*.tf")
	if err != nil || len(files) != 6 {
		t.Fatalf("got files %v, %v, want 6", files, err)
	}
	declared := []string{"path.module"}
	var used []string
	for _, name := range files {
		src := read(t, name)
		if !bytes.Equal(hclwrite.Format(src), src) {
			t.Errorf("%s is not as terraform fmt writes it", name)
		}
		f, diags := hclsyntax.ParseConfig(src, name, hcl.InitialPos)
		if diags.HasErrors() {
			t.Fatal(diags)
		}
		body, ok := f.Body.(*hclsyntax.Body)
		if !ok {
			t.Fatalf("%s: got a %T", name, f.Body)
		}
		for _, b := range body.Blocks {
			switch b.Type {
			case "locals":
				for key := range b.Body.Attributes {
					declared = append(declared, "local."+key)
				}
			case "variable":
				declared = append(declared, "var."+b.Labels[0])
			case "resource":
				declared = append(declared, strings.Join(b.Labels, "."))
			case "data":
				declared = append(declared, "data."+strings.Join(b.Labels, "."))
			}
			used = append(used, references(b.Body)...)
		}
	}
	for _, r := range used {
		if !slices.Contains(declared, r) {
			t.Errorf("%s is used and not declared", r)
		}
	}
	for _, d := range declared {
		if strings.HasPrefix(d, "var.") && !slices.Contains(used, d) {
			t.Errorf("%s is declared and not used", d)
		}
	}
}

// references are what expressions of a body name outside of themselves.
func references(body *hclsyntax.Body) []string {
	var found []string
	for _, a := range body.Attributes {
		for _, v := range a.Expr.Variables() {
			var parts []string
			for _, step := range v {
				switch s := step.(type) {
				case hcl.TraverseRoot:
					parts = append(parts, s.Name)
				case hcl.TraverseAttr:
					parts = append(parts, s.Name)
				}
			}
			n := 2
			if parts[0] == "data" {
				n = 3
			}
			local := slices.Contains([]string{"each", "lifecycle_rule", "t", "p"}, parts[0])
			if len(parts) >= n && !local {
				found = append(found, strings.Join(parts[:n], "."))
			}
		}
	}
	for _, b := range body.Blocks {
		found = append(found, references(b.Body)...)
	}
	return found
}

// TestTerraform_asSetup holds topics, filter and settings to those of mettle setup,
// which would change or refuse what differs.
func TestTerraform_asSetup(t *testing.T) {
	setup := string(read(t, "../mettle/queue/pubsub/setup.go")) + string(read(t, "../mettle/queue/pubsub/names.go"))
	m := regexp.MustCompile(`range \[\]string\{(.*)\} \{\n.*ensureTopic`).FindStringSubmatch(setup)
	if m == nil {
		t.Fatal("setup.go no longer says which topics it makes as this test knows it")
	}
	ours := regexp.MustCompile(`topics = toset\(\[(.*)\]\)`).FindSubmatch(read(t, "terraform/gcp/main.tf"))
	sorted := func(s string) []string { l := strings.Split(s, ", "); slices.Sort(l); return l }
	if got, want := sorted(string(ours[1])), sorted(m[1]); !slices.Equal(got, want) {
		t.Errorf("got topics %v, want %v", got, want)
	}
	tf := string(read(t, "terraform/gcp/pubsub.tf"))
	for setups, terraforms := range map[string]string{
		"attributes.%s = \"%s\" AND attributes.%s = \"%s\"": `attributes.pool = \"${each.value.pool}\" AND attributes.band = \"${each.value.band}\"`,
		"jobRetention = 24 * time.Hour":                     `message_retention_duration = "86400s"`,
		"min(max(2*o.MaxAttempts+4, 5), 100)":               `min(max(2 * var.attempts + 4, 5), 100)`,
	} {
		if !strings.Contains(setup, setups) || !strings.Contains(tf, terraforms) {
			t.Errorf("%q of mettle setup and %q of Terraform are not both there", setups, terraforms)
		}
	}
}
