package pubsub

import (
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// ParseURL reads the Options that a URL of the package comment's form says. What
// New needs besides, the caller adds.
func ParseURL(u *url.URL) (Options, error) {
	o := Options{Project: u.Host, Prefix: strings.Trim(u.Path, "/")}
	if u.Scheme != "gcppubsub" || o.Project == "" || o.Prefix == "" || u.User != nil || u.Fragment != "" {
		return Options{}, fmt.Errorf("%s is not of the form gcppubsub://PROJECT/PREFIX", u.Redacted())
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return Options{}, fmt.Errorf("%s: %w", u.Redacted(), err)
	}
	for key, values := range query {
		value := values[len(values)-1]
		switch key {
		case "lease":
			o.LeaseTime, err = time.ParseDuration(value)
		case "attempts":
			o.MaxAttempts, err = strconv.Atoi(value)
		case "bands":
			var bands bool
			bands, err = strconv.ParseBool(value)
			o.OneBand = !bands
		case "pools":
			o.Pools = strings.Split(value, ",")
		default:
			err = fmt.Errorf("there is no setting %q; there are lease, attempts, bands and pools", key)
		}
		if err != nil {
			return Options{}, fmt.Errorf("%s: %w", u.Redacted(), err)
		}
	}
	if err := o.withDefaults().validate(); err != nil {
		return Options{}, err
	}
	return o, nil
}
