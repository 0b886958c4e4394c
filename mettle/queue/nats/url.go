package nats

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// defaultPort is that of NATS.
const defaultPort = "4222"

// ParseURL reads the Options of a broker's address,
//
//	nats://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]]...[/PREFIX][?SETTING=VALUE&...]
//
// or tls:// likewise. TOKEN@ instead of USER:PASSWORD@ is a token. The settings
// are replicas, lease, attempts, max_jobs, max_bytes, updates_age, timeout,
// heartbeat, credentials, ca, cert, key (files), domain, memory and must_exist
// (true or false).
func ParseURL(s string) (Options, error) {
	scheme, rest, ok := strings.Cut(s, "://")
	if !ok || scheme != "nats" && scheme != "tls" {
		return Options{}, errors.New("nats queue: not an address of the kind nats://HOST:PORT/PREFIX")
	}
	rest, query, _ := strings.Cut(rest, "?")
	hosts, prefix, _ := strings.Cut(rest, "/")
	o := Options{Prefix: prefix}
	if i := strings.LastIndexByte(hosts, '@'); i >= 0 {
		if err := o.setUser(hosts[:i]); err != nil {
			return Options{}, err
		}
		hosts = hosts[i+1:]
	}
	for host := range strings.SplitSeq(hosts, ",") {
		server, err := address(host)
		if err != nil {
			return Options{}, err
		}
		o.Servers = append(o.Servers, scheme+"://"+server)
	}
	values, err := url.ParseQuery(query)
	if err != nil {
		return Options{}, errors.New("nats queue: the address's settings are not of the form NAME=VALUE&NAME=VALUE")
	}
	for name, v := range values {
		if len(v) != 1 {
			return Options{}, fmt.Errorf("nats queue: the setting %s is given %d times", name, len(v))
		}
		if err := o.set(name, v[0]); err != nil {
			return Options{}, fmt.Errorf("nats queue: the setting %s: %w", name, err)
		}
	}
	return o, o.withDefaults().validate()
}

// setUser takes what is before the @. Errors don't repeat it, for it is secret.
func (o *Options) setUser(s string) error {
	user, password, both := strings.Cut(s, ":")
	user, err := url.PathUnescape(user)
	if err == nil {
		password, err = url.PathUnescape(password)
	}
	switch {
	case err != nil || user == "":
		return errors.New("nats queue: the address's user or password is not well escaped")
	case both:
		o.User, o.Password = user, password
	default:
		o.Token = user
	}
	return nil
}

// address checks HOST[:PORT] and adds the default port.
func address(s string) (string, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		host, port = strings.TrimSuffix(strings.TrimPrefix(s, "["), "]"), defaultPort
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || host == "" || strings.ContainsAny(host, "[]@ /?#%") {
		return "", fmt.Errorf("nats queue: %q is not HOST:PORT", s)
	}
	return net.JoinHostPort(host, port), nil
}

func (o *Options) set(name, value string) (err error) {
	switch name {
	case "replicas":
		o.Replicas, err = strconv.Atoi(value)
	case "lease":
		o.LeaseTime, err = time.ParseDuration(value)
	case "attempts":
		o.MaxAttempts, err = strconv.Atoi(value)
	case "max_jobs":
		o.MaxJobs, err = strconv.Atoi(value)
	case "max_bytes":
		o.MaxBytes, err = strconv.ParseInt(value, 10, 64)
	case "updates_age":
		o.UpdatesAge, err = time.ParseDuration(value)
	case "timeout":
		o.Timeout, err = time.ParseDuration(value)
	case "heartbeat":
		o.Heartbeat, err = time.ParseDuration(value)
	case "credentials":
		o.CredentialsFile = value
	case "ca":
		o.CAFile = value
	case "cert":
		o.CertFile = value
	case "key":
		o.KeyFile = value
	case "domain":
		o.Domain = value
	case "memory":
		o.Memory, err = strconv.ParseBool(value)
	case "must_exist":
		o.MustExist, err = strconv.ParseBool(value)
	default:
		return errors.New("there is no such setting")
	}
	return err
}
