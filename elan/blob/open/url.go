package open

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob/bucket"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/gcs"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/blob/s3"
	"github.com/mettle-build/mettle/elan/blob/tiered"
	"github.com/mettle-build/mettle/elan/flags"
)

// minBytes is a size below which somebody forgot the unit.
const minBytes = 1e6

// spec is one store to be opened: its URL, and the options that apply to it.
type spec struct {
	given string // the URL as it was given
	url   *url.URL
	name  string // in metrics
	o     Options

	compressed   bool          // kept as zstd
	promised     time.Duration // the lifetime that clients may count on
	maxBlobBytes int64         // of a tier above another
}

func (s *spec) scheme() string { return s.url.Scheme }

func (s *spec) isBucket() bool { return s.url.Scheme == "gs" || s.url.Scheme == "s3" }

// parseAll reads the URLs, the last of which is the authority's.
func parseAll(urls []string, o Options) ([]*spec, error) {
	if len(urls) == 0 {
		return nil, errors.New("no storage URL given")
	}
	if len(urls) > 1 && o.MaxBytes != 0 {
		return nil, errors.New("a size for several stores means nothing: say ?max_size=SIZE in the URL of each")
	}
	specs := make([]*spec, len(urls))
	names := map[string]int{}
	for i, u := range urls {
		sp, err := parse(u, o, len(urls) > 1, i == len(urls)-1)
		if err != nil {
			return nil, fmt.Errorf("storage URL %q: %w", u, err)
		}
		if slices.ContainsFunc(specs[:i], func(other *spec) bool { return samePlace(other.url, sp.url) }) {
			return nil, fmt.Errorf("storage URL %q: it is given twice", u)
		}
		sp.name = sp.scheme()
		if names[sp.scheme()]++; names[sp.scheme()] > 1 {
			sp.name += strconv.Itoa(names[sp.scheme()])
		}
		if len(urls) > 1 && o.Registerer != nil {
			// Two stores of a kind have metrics of the same names.
			sp.o.Registerer = prometheus.WrapRegistererWith(prometheus.Labels{"tier": sp.name}, o.Registerer)
		}
		specs[i] = sp
	}
	return specs, nil
}

// samePlace reports whether two URLs are of one store. Memory is another one each time.
func samePlace(a, b *url.URL) bool {
	return a.Scheme == b.Scheme && a.Scheme != "mem" && a.Host == b.Host && strings.Trim(a.Path, "/") == strings.Trim(b.Path, "/")
}

// parse reads one URL, and takes from its query the options that are not the
// store's own.
func parse(given string, o Options, tiers, last bool) (*spec, error) {
	u, err := url.Parse(given)
	if err != nil {
		return nil, err
	}
	s := &spec{given: given, url: u, o: o}
	switch {
	case !slices.Contains([]string{"file", "mem", "gs", "s3"}, u.Scheme):
		return nil, fmt.Errorf("scheme %q is unknown, want file:///DIRECTORY, mem://, gs://BUCKET or s3://BUCKET", u.Scheme)
	case u.Scheme == "file" && (u.Host != "" || u.Path == ""):
		return nil, errors.New("want three slashes and an absolute path, as in file:///var/cache/elan")
	case u.Scheme == "mem" && (u.Host != "" || u.Path != ""):
		return nil, errors.New("want just mem://, and options after a question mark")
	case (u.Scheme == "file" || u.Scheme == "mem") && (u.Fragment != "" || u.User != nil):
		return nil, errors.New("want neither a user nor a # in it")
	}
	if o.MaxBytes != 0 && s.isBucket() {
		return nil, errors.New("a bucket has no bound: leave --max_size out, its lifecycle rule makes room")
	}
	if err := s.options(tiers, last); err != nil {
		return nil, err
	}
	if 0 < s.o.MaxBytes && s.o.MaxBytes < minBytes {
		return nil, fmt.Errorf("a maximal size of %d bytes holds nothing: want 1MB at least, as in 100GB", s.o.MaxBytes)
	}
	s.promised = cmp.Or(s.o.MinLifetime, defaultMinLifetime)
	switch {
	case !last:
		s.o.MinLifetime = min(s.promised, upperLifetime)
	case tiers || s.isBucket():
		// What is used is heard of later, by so much at most.
		s.o.MinLifetime = s.promised + s.promised/slackPart
	}
	return s, nil
}

// options reads the query.
func (s *spec) options(tiers, last bool) error {
	values, err := url.ParseQuery(s.url.RawQuery)
	if err != nil {
		return err
	}
	if !last && s.scheme() == "mem" {
		s.maxBlobBytes = tiered.WholeBytes
	}
	disk, local := s.scheme() == "file", !s.isBucket()
	known := map[string]struct {
		applies bool
		set     func(v string) error
	}{
		"max_size":      {local, size(&s.o.MaxBytes)},
		"min_free":      {disk, size(&s.o.MinFreeBytes)},
		"min_lifetime":  {last, duration(&s.o.MinLifetime)},
		"max_blob_size": {!last, size(&s.maxBlobBytes)},
		"compress":      {!disk, s.compress},
	}
	for name, all := range values {
		if len(all) != 1 {
			return fmt.Errorf("option %s is there %d times", name, len(all))
		}
		option, ok := known[name]
		switch {
		case !ok && s.isBucket():
			continue // the bucket's own, or its error
		case !ok:
			return fmt.Errorf("option %s is unknown", name)
		case !option.applies && tiers:
			return fmt.Errorf("option %s does not apply to this tier", name)
		case name == "max_size" && s.o.MaxBytes != 0:
			return errors.New("option max_size: the size is given by --max_size too; say one of them")
		case !option.applies:
			return fmt.Errorf("option %s does not apply to this store", name)
		}
		if err := option.set(all[0]); err != nil {
			return fmt.Errorf("option %s: %w", name, err)
		}
		values.Del(name)
	}
	s.url.RawQuery = values.Encode()
	return nil
}

// compress sets how blobs are kept.
func (s *spec) compress(v string) error {
	s.compressed = v == "zstd"
	if !s.compressed && v != "none" {
		return fmt.Errorf("%q is neither zstd nor none", v)
	}
	return nil
}

func size(to *int64) func(v string) error {
	return func(v string) error {
		var s flags.Size
		err := s.UnmarshalText([]byte(v))
		*to = int64(s)
		return err
	}
}

func duration(to *time.Duration) func(v string) error {
	return func(v string) (err error) {
		*to, err = time.ParseDuration(v)
		if err == nil && *to <= 0 {
			err = fmt.Errorf("%v is not positive", *to)
		}
		return err
	}
}

// open opens the store itself. The errors name it.
func (s *spec) open(ctx context.Context) (Storage, error) {
	var opened Storage
	var err error
	switch s.scheme() {
	case "file":
		opened, err = s.openDir()
	case "mem":
		opened, err = s.openMem()
	default:
		opened, err = s.openBucket(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("storage URL %q: %w", s.given, err)
	}
	return opened, nil
}

// openDir opens the store of a local directory, which it creates if need be.
func (s *spec) openDir() (Storage, error) {
	return orNil(file.New(file.Options{
		Dir:          s.url.Path,
		MaxBytes:     s.o.MaxBytes,
		MinFreeBytes: s.o.MinFreeBytes,
		MinLifetime:  s.o.MinLifetime,
		// 0 is the default there.
		ScrubBytesPerSecond: cmp.Or(s.o.ScrubRate, -1),
		Logger:              s.o.Logger,
		Registerer:          s.o.Registerer,
	}))
}

func (s *spec) openMem() (Storage, error) {
	return orNil(mem.New(mem.Options{MaxBytes: s.o.MaxBytes, MinLifetime: s.o.MinLifetime, Containers: s.compressed, Registerer: s.o.Registerer}))
}

// openBucket opens a store in an object storage.
func (s *spec) openBucket(ctx context.Context) (Storage, error) {
	complete := func(b *bucket.Options) {
		b.MinLifetime, b.Logger, b.Registerer = s.o.MinLifetime, s.o.Logger, s.o.Registerer
		b.Containers = s.compressed
	}
	if s.scheme() == "s3" {
		so, err := s3.ParseURL(s.url)
		if err != nil {
			return nil, err
		}
		complete(&so.Options)
		return orNil(s3.New(ctx, so))
	}
	gso, err := gcs.ParseURL(s.url)
	if err != nil {
		return nil, err
	}
	complete(&gso.Options)
	return orNil(gcs.New(ctx, gso))
}

// orNil is s, or a nil that is one where it is not there.
func orNil[S Storage](s S, err error) (Storage, error) {
	if err != nil {
		return nil, err
	}
	return s, nil
}
