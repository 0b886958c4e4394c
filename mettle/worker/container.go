//go:build linux

package worker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/metrics/spans"
	"github.com/mettle-build/mettle/mettle/command"
	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/worker/image"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

// imageOf is the container image that the action's platform asks for; the zero
// Reference is none. What the operator declares that this machine is, it is.
func (e *Executor) imageOf(want *repb.Platform) (ref image.Reference, err error) {
	o := e.o
	if o.Images == nil || !o.sandboxed {
		return ref, nil
	}
	asked, err := askedImage(want)
	if err != nil || asked == "" || o.declares(asked) {
		return ref, err
	}
	if asked == e.asked {
		return e.askedRef, nil // most actions of a build want the same
	}
	if ref, err = o.Images.Parse(asked); err == nil {
		e.asked, e.askedRef = asked, ref
	}
	return ref, err
}

// askedImage is the value that the platform has for an image, "" for none.
func askedImage(want *repb.Platform) (asked string, err error) {
	for _, pr := range want.GetProperties() {
		value := pr.GetValue()
		if pr.GetName() != platform.ContainerImage || value == "" || value == "none" || value == asked {
			continue
		}
		if asked != "" {
			return "", fmt.Errorf("%w: the action asks for two container images, %.200q and %.200q", command.ErrInvalid, asked, value)
		}
		asked = value
	}
	return asked, nil
}

func (o *Options) declares(image string) bool {
	for _, p := range o.Properties {
		if p.Name == platform.ContainerImage && p.Value == image && image != platform.AnyValue {
			return true
		}
	}
	return false
}

// openImage has the image of r there, unless this slot has a runner in it.
func (e *Executor) openImage(ctx context.Context, r *run) error {
	if r.image == (image.Reference{}) {
		return nil
	}
	if r.place.image = r.image.Digest(); r.place.image != "" && e.runners.has(r.place) {
		return nil
	}
	img, err := e.pull(ctx, r.image)
	if err != nil {
		return err
	}
	r.opened = img
	r.isIn(img)
	return nil
}

// isIn notes which image the action runs in.
func (r *run) isIn(img *image.Image) {
	if r.image.Digest() == "" && r.place.image == "" {
		r.notes = append(r.notes, fmt.Sprintf("Ran in image %s, which is %s", r.image, img.Digest))
	}
	r.place.image = img.Digest
}

// pull has the image there, which the caller closes.
func (e *Executor) pull(ctx context.Context, ref image.Reference) (*image.Image, error) {
	ctx, span := spans.Start(ctx, "open image")
	img, err := e.o.Images.Open(ctx, ref)
	if errors.Is(err, image.ErrFull) {
		// Of the images that are in use, some are only ready to be used again.
		if err := e.o.slots.dropImages(); err != nil {
			spans.End(span, err)
			return nil, err
		}
		img, err = e.o.Images.Open(ctx, ref)
	}
	spans.End(span, err)
	if err != nil {
		e.imageAway = errors.Is(err, image.ErrUnavailable)
	}
	return img, err
}

// takeImage is what openImage has opened, for the one who closes it.
func (r *run) takeImage() *image.Image {
	img := r.opened
	r.opened = nil
	return img
}

// leaveImage is called when r has ended, whatever became of it.
func (e *Executor) leaveImage(r *run) {
	if img := r.takeImage(); img != nil {
		img.Close()
	}
	if r.place != (place{}) {
		e.runners.rest()
	}
}

// TryImages returns nil where actions can run in container images, and else says
// why not. For a moment it makes files in dir, which is there.
func TryImages(dir string) error {
	dir, err := os.MkdirTemp(dir, "try-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // two empty directories at most
	layers := []string{filepath.Join(dir, "below"), filepath.Join(dir, "above")}
	for _, l := range layers {
		if err := os.Mkdir(l, 0o755); err != nil { //nolint:gosec // for actions
			return err
		}
	}
	r, err := sandbox.New(sandbox.Options{Layers: layers})
	if err != nil {
		return err
	}
	return r.Close()
}
