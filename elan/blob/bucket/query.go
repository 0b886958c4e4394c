package bucket

import (
	"fmt"
	"net/url"
	"strconv"
	"time"
)

// ParseQuery reads the options of a URL's query that all buckets have into o,
// and returns the others, of which each is there once. A password or a fragment
// is an error.
//
//	min_lifetime, expire_after, touch_every   durations, as in 720h
//	max_requests, max_reads                   numbers
func ParseQuery(u *url.URL, o *Options) (map[string]string, error) {
	if u.User != nil || u.Fragment != "" || u.Port() != "" {
		return nil, fmt.Errorf("want %s://BUCKET/PREFIX?OPTION=VALUE", u.Scheme)
	}
	values, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return nil, err
	}
	durations := map[string]*time.Duration{"min_lifetime": &o.MinLifetime, "expire_after": &o.ExpireAfter, "touch_every": &o.TouchEvery}
	numbers := map[string]*int{"max_requests": &o.MaxRequests, "max_reads": &o.MaxReads}
	rest := map[string]string{}
	for name, all := range values {
		if len(all) != 1 {
			return nil, fmt.Errorf("option %s is there %d times", name, len(all))
		}
		if d, ok := durations[name]; ok {
			*d, err = time.ParseDuration(all[0])
		} else if n, ok := numbers[name]; ok {
			*n, err = strconv.Atoi(all[0])
		} else {
			rest[name] = all[0]
		}
		if err != nil {
			return nil, fmt.Errorf("option %s: %w", name, err)
		}
	}
	return rest, nil
}
