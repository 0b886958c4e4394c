package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/asset"
	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/image"
)

// imageFlags say which container images actions may run in.
type imageFlags struct {
	Images          string        `help:"Whether actions that ask for container-image=docker://... or oci://... run in that image. auto: where this machine allows it and --sandbox is not bare. on: the same, or nothing starts." enum:"auto,on,off" default:"auto"`
	ImageRegistries []string      `name:"image_registries" help:"Where images may come from: HOST or HOST/PREFIX; * is any on the public Internet." placeholder:"HOST" default:"*"`
	ImageDir        []string      `name:"image_dir" help:"A directory of this machine in which OCI layouts and tarballs may be, which actions name as oci:///PATH@sha256:...; for several, give it several times." type:"path" placeholder:"DIR"`
	ImageTags       bool          `name:"image_tags" help:"Let actions name images by tags. What a tag means changes, and so do builds then."`
	ImageAuth       string        `name:"image_auth" help:"A file of credentials for registries, as docker login writes it." type:"path" placeholder:"FILE"`
	ImageCacheSize  flags.Size    `name:"image_cache_size" help:"How much of images is kept unpacked, as in 20GB. 0: a tenth of the disk, at most 20GiB." default:"0"`
	ImageMaxSize    flags.Size    `name:"image_max_size" help:"How large an image may be, unpacked." default:"8GiB"`
	ImageTimeout    time.Duration `name:"image_timeout" help:"How long it may take to pull an image." default:"10m"`
}

func (f imageFlags) check() error {
	switch {
	case f.ImageTimeout <= 0:
		return fmt.Errorf("--image_timeout: %v is not above 0", f.ImageTimeout)
	case f.ImageMaxSize <= 0:
		return errors.New("--image_max_size: it is not above 0")
	}
	for _, r := range f.ImageRegistries {
		if strings.Contains(r, "://") {
			return fmt.Errorf("--image_registries: %q is no HOST or HOST/PREFIX", r)
		}
	}
	if f.ImageAuth != "" {
		if _, err := os.Stat(f.ImageAuth); err != nil {
			return fmt.Errorf("--image_auth: %w", err)
		}
	}
	return nil
}

// imageOptions are what a cache of images needs beside the flags.
type imageOptions struct {
	dir      string
	sandbox  string // of --sandbox
	log      *slog.Logger
	registry prometheus.Registerer // nil: none
}

// openImages returns nil where there are to be no images.
func (f imageFlags) openImages(o imageOptions) (*image.Cache, error) {
	if f.Images == "off" {
		return nil, nil //nolint:nilnil // as said
	}
	if err := f.tryImages(o); err != nil {
		if f.Images == "on" {
			return nil, fmt.Errorf("--images: actions can't run in container images: %w", err)
		}
		o.log.Info("actions can't run in container images here", "reason", err)
		return nil, nil //nolint:nilnil // as said
	}
	c, err := image.New(image.Options{
		Dir: o.dir, MaxBytes: int64(f.ImageCacheSize), MaxImageBytes: int64(f.ImageMaxSize),
		Registries: f.ImageRegistries, LocalDirs: f.ImageDir, Tags: f.ImageTags, Timeout: f.ImageTimeout,
		DockerConfig: f.ImageAuth, Control: asset.NewGuard(nil).Control, Logger: o.log, Registerer: o.registry,
	})
	if errors.Is(err, image.ErrUnsupported) && f.Images == "auto" {
		o.log.Info("actions can't run in container images here", "reason", err)
		return nil, nil //nolint:nilnil // as said
	}
	return c, err
}

func (f imageFlags) tryImages(o imageOptions) error {
	if worker.Isolation(o.sandbox) == worker.Bare {
		return errors.New("--sandbox is bare")
	}
	if err := os.MkdirAll(o.dir, 0o700); err != nil {
		return err
	}
	return worker.TryImages(o.dir)
}

// imagesIn is where a process keeps images that keeps everything else in dir.
func imagesIn(dir string) string { return filepath.Join(dir, "images") }

// withImages are props, and that any image can be had if there is a cache of them.
func withImages(props []platform.Property, images *image.Cache) []platform.Property {
	if images == nil {
		return props
	}
	return append(slices.Clone(props), platform.Property{Name: platform.ContainerImage, Value: platform.AnyValue})
}
