// Command fakepubsub serves a fake Cloud Pub/Sub for tests and trials with
// several processes. It keeps everything in memory, and can fail on purpose:
//
//	go run ./mettle/queue/pubsub/pubsubtest/fakepubsub --addr localhost:8085 --drop_acks 0.01 &
//	export PUBSUB_EMULATOR_HOST=localhost:8085
//	mettle setup --queue gcppubsub://any-project/any-prefix
//
// --help lists its flags. It ends on SIGTERM and SIGINT. It is no part of
// Mettle's binaries; tests in Go start it by pubsubtest.Start instead.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/mettle-build/mettle/mettle/queue/pubsub/pubsubtest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := pubsubtest.Main(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
