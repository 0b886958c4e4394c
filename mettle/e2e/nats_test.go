package e2e_test

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"

	natsserver "github.com/nats-io/nats-server/v2/server"
	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// natsDirVar makes of this test's binary a broker that keeps its files in the
// directory that the variable names: there need not be a nats-server here.
const natsDirVar = "METTLE_E2E_NATS"

// natsMain is the broker, alone or, with --name, one of a cluster. It ends by a kill.
func natsMain(dir string, args []string) int {
	flags := flag.NewFlagSet("nats", flag.ExitOnError)
	o := &natsserver.Options{Host: "127.0.0.1", JetStream: true, StoreDir: dir, NoLog: true, NoSigs: true, SyncAlways: true}
	flags.IntVar(&o.Port, "port", 0, "for clients")
	flags.StringVar(&o.ServerName, "name", "", "in the cluster")
	flags.IntVar(&o.Cluster.Port, "cluster_port", 0, "for the cluster")
	routes := flags.String("routes", "", "where the servers of the cluster are")
	_ = flags.Parse(args) // it exits
	if o.ServerName != "" {
		o.Cluster.Name, o.Cluster.Host = "cluster", "127.0.0.1"
		o.Routes = natsserver.RoutesFromStr(*routes)
	}
	s, err := natsserver.NewServer(o)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	s.Start()
	if !s.ReadyForConnections(startTimeout) {
		fmt.Fprintln(os.Stderr, "the broker does not start")
		return 1
	}
	fmt.Println("serves on nats://" + s.Addr().String())
	s.WaitForShutdown()
	return 0
}

// newNATS is a broker that has yet to be started.
func newNATS(t *testing.T, flags ...string) *server {
	t.Helper()
	dir := t.TempDir() // before newSelf: it is removed after the broker has ended
	s := newSelf(t, "nats://")
	s.args = append([]string{"--port=" + strconv.Itoa(s.Port)}, flags...)
	s.env = []string{natsDirVar + "=" + dir}
	return s
}

// A natsCluster is three brokers that hold each message three times.
type natsCluster map[string]*server // by name

func newNATSCluster(t *testing.T) natsCluster {
	t.Helper()
	const n = 3
	var ports, routes []string
	for range n {
		port := strconv.Itoa(freePort(t))
		ports = append(ports, port)
		routes = append(routes, "nats://"+net.JoinHostPort("127.0.0.1", port))
	}
	c := natsCluster{}
	for i, port := range ports {
		name := fmt.Sprint("n", i)
		c[name] = newNATS(t, "--name="+name, "--cluster_port="+port, "--routes="+strings.Join(routes, ","))
	}
	for _, s := range c {
		s.Start()
	}
	js, closeIt := c.jetStream(t)
	defer closeIt()
	awaitNews(t, func() bool {
		_, err := js.AccountInfo(t.Context())
		return err == nil
	}, "the cluster elects nobody")
	return c
}

// jetStream is a client of the cluster.
func (c natsCluster) jetStream(t *testing.T) (js jetstream.JetStream, closeIt func()) {
	t.Helper()
	nc, err := natsgo.Connect("nats://" + strings.ReplaceAll(c.addrs(), ",", ",nats://"))
	if err != nil {
		t.Fatal(err)
	}
	if js, err = jetstream.New(nc); err != nil {
		t.Fatal(err)
	}
	return js, nc.Close
}

// addrs is where clients find the cluster.
func (c natsCluster) addrs() string {
	var addrs []string
	for _, s := range c {
		addrs = append(addrs, s.Addr())
	}
	return strings.Join(addrs, ",")
}

// leader is the server that leads a stream.
func (c natsCluster) leader(ctx context.Context, t *testing.T, stream string) *server {
	t.Helper()
	js, closeIt := c.jetStream(t)
	defer closeIt()
	var leads *server
	awaitNews(t, func() bool {
		s, err := js.Stream(ctx, stream)
		if err != nil {
			return false
		}
		leads = c[s.CachedInfo().Cluster.Leader]
		return leads != nil
	}, "no server leads the stream "+stream)
	return leads
}
