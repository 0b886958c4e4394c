package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/mettle-build/mettle/elan/overview"
	"github.com/mettle-build/mettle/metrics"
	"github.com/mettle-build/mettle/mettle/api"
	"github.com/mettle-build/mettle/mettle/platform"
)

// What an API server is told of pools, and shows of them.

// poolFlags are those of an API server.
type poolFlags struct {
	Pools      []string      `help:"A pool of workers that is there even while it has none, as NAME[/SLOTS][:key=value,...] with the slots of one worker, such as gpu/8:gpu=yes; for several, give it several times. Other pools come with their first worker, which a server that has just started may hear of only after a quarter of a minute." placeholder:"POOL" sep:";"`
	PoolLinger time.Duration `help:"How long actions are queued for a pool whose last worker has gone, before they go to another or are refused." default:"5m"`
}

func (f poolFlags) check() error {
	if f.PoolLinger <= 0 {
		return fmt.Errorf("--pool_linger: %v is not above 0", f.PoolLinger)
	}
	_, err := f.pools()
	return err
}

func (f poolFlags) pools() ([]platform.Pool, error) {
	pools := make([]platform.Pool, 0, len(f.Pools))
	for _, s := range f.Pools {
		list := []string{s}
		if !strings.Contains(s, ":") { // names alone, as setup takes them
			list = strings.Split(s, ",")
		}
		for _, s := range list {
			p, err := platform.ParsePool(s)
			if err != nil {
				return nil, fmt.Errorf("--pools: %w", err)
			}
			pools = append(pools, p)
		}
	}
	return pools, nil
}

// platforms are the pools of a fleet.
func (f poolFlags) platforms(log *slog.Logger) (*platform.Set, error) {
	pools, err := f.pools()
	if err != nil {
		return nil, err
	}
	return platform.New(platform.Options{Pools: pools, FromWorkers: true, Linger: f.PoolLinger, Logger: log})
}

// tables are those of the index page: storage, and pools where there are any.
func (a *adminPage) tables(figures *overview.Overview) func(context.Context) ([]metrics.Table, error) {
	return func(ctx context.Context) ([]metrics.Table, error) {
		tables, err := figures.Tables(ctx)
		actions, gatherErr := actionTables(a.registry)
		tables = append(actions, tables...)
		if a.api != nil {
			tables = append([]metrics.Table{poolTable(a.api.Pools())}, tables...)
		}
		return tables, errors.Join(err, gatherErr)
	}
}

// poolTable shows the pools to people.
func poolTable(pools []api.Pool) metrics.Table {
	t := metrics.Table{Title: "Pools"}
	for _, p := range pools {
		props := make([]string, len(p.Properties))
		for i, prop := range p.Properties {
			props[i] = prop.String()
		}
		workers := []string{fmt.Sprint(p.Taking)}
		for _, more := range []struct {
			n    int
			what string
		}{{p.Paused, "paused"}, {p.Draining, "draining"}} {
			if more.n > 0 {
				workers = append(workers, fmt.Sprintf("(and %d %s)", more.n, more.what))
			}
		}
		queued := fmt.Sprintf("queued here %d", p.Queued)
		if p.Oldest > 0 {
			queued += fmt.Sprintf(" (the longest for %v)", p.Oldest.Round(time.Second))
		}
		t.Rows = append(t.Rows, metrics.Row{
			Name: p.Name,
			Value: fmt.Sprintf("workers %s, slots %d, running %d, %s, executing for clients here %d",
				strings.Join(workers, " "), p.Slots, p.Running, queued, p.Executing),
			Note: strings.Join(props, " "),
		})
	}
	if len(pools) == 0 {
		t.Rows = []metrics.Row{{Name: "none", Note: "no worker has been heard of, and none is declared"}}
	}
	return t
}
