package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const (
	// scrapeTimeout and maxScrape bound one look at a server's metrics.
	scrapeTimeout = 5 * time.Second
	maxScrape     = 16 * mib
	// ticksPerSecond is the unit of CPU times in /proc: 100 in the interface to
	// programs of every Linux port, whatever the kernel's own clock.
	ticksPerSecond = 100
)

// probe looks at the server's processes from outside.
type probe struct {
	urls []string // of Prometheus metrics
	pids []int    // on this machine, Linux only
	dirs []string // on this machine, whose files are counted
}

// sample is the state of the server's processes, summed.
type sample struct {
	cpu, children time.Duration
	rssBytes      float64
	counts
}

// counts are what grows where something is left behind with each call.
type counts struct{ goroutines, descriptors, files float64 }

// sample is zero where there is nothing to look at.
func (p probe) sample(ctx context.Context) (sample, error) {
	var s sample
	for _, pid := range p.pids {
		if err := s.addProcess(pid); err != nil {
			return s, fmt.Errorf("process %d: %w", pid, err)
		}
	}
	for _, url := range p.urls {
		if err := s.addMetrics(ctx, url, len(p.pids) > 0); err != nil {
			return s, fmt.Errorf("metrics at %s: %w", url, err)
		}
	}
	for _, dir := range p.dirs {
		if err := s.addFiles(dir); err != nil {
			return s, fmt.Errorf("files: %w", err)
		}
	}
	return s, nil
}

// isBlind reports whether there is nothing to look at.
func (p probe) isBlind() bool { return len(p.pids)+len(p.urls)+len(p.dirs) == 0 }

// watchEvery is how often watch looks.
const watchEvery = 50 * time.Millisecond

// watch looks at the memory of the server's processes until the returned function
// is called, which tells the most that was seen. Where on is false, or there is
// nothing to look at, that is 0.
func (p probe) watch(ctx context.Context, on bool) (peak func() float64) {
	if !on || p.isBlind() {
		return func() float64 { return 0 }
	}
	ctx, cancel := context.WithCancel(ctx)
	highest := make(chan float64, 1) // the result, so that the goroutine ends
	go func() {
		most := 0.0
		tick := time.NewTicker(watchEvery)
		defer tick.Stop()
		for {
			if s, err := p.sample(ctx); err == nil {
				most = max(most, s.rssBytes)
			}
			select {
			case <-ctx.Done():
				highest <- most
				return
			case <-tick.C:
			}
		}
	}()
	return func() float64 {
		cancel()
		return <-highest
	}
}

// usage is what ops ops used since before; nil where there is nothing to look at.
func (p probe) usage(ctx context.Context, before sample, ops uint64) *ServerUsage {
	if p.isBlind() {
		return nil
	}
	after, err := p.sample(ctx)
	if err != nil {
		return &ServerUsage{Error: err.Error()}
	}
	n := float64(max(ops, 1))
	return &ServerUsage{
		CPUMS: ms(after.cpu-before.cpu) / n, ChildrenCPUMS: ms(after.children-before.children) / n,
		RSSBytes: after.rssBytes, GoroutinesBefore: before.goroutines, DescriptorsBefore: before.descriptors, FilesBefore: before.files,
	}
}

// recount fills in what is there some time after the last call: a server may have
// yet to clean up when it has answered.
func (p probe) recount(ctx context.Context, u *ServerUsage) {
	if u == nil || u.Error != "" {
		return
	}
	after, err := p.sample(ctx)
	if err != nil {
		u.Error = err.Error()
		return
	}
	u.GoroutinesAfter, u.DescriptorsAfter, u.FilesAfter = after.goroutines, after.descriptors, after.files
}

// addFiles counts what is below dir. What goes away meanwhile is counted or not.
func (s *sample) addFiles(dir string) error {
	return filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && path != dir {
			return nil
		}
		if err == nil && path != dir {
			s.files++
		}
		return err
	})
}

// addMetrics adds what the Go and process collectors of a Prometheus client
// show. Where processes are looked at too, it adds only the goroutines, which
// those do not tell.
func (s *sample) addMetrics(ctx context.Context, url string, goroutinesOnly bool) error {
	ctx, cancel := context.WithTimeout(ctx, scrapeTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return err
	}
	// A transport of its own, closed after the one call, leaves no goroutine.
	t := &http.Transport{DisableKeepAlives: true}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }() // it was only read
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("status %s", resp.Status)
	}
	values, err := parseMetrics(io.LimitReader(resp.Body, maxScrape))
	if err != nil {
		return err
	}
	s.goroutines += values["go_goroutines"]
	if goroutinesOnly {
		return nil
	}
	s.descriptors += values["process_open_fds"]
	cpu, ok := values["process_cpu_seconds_total"]
	if !ok {
		return errors.New("no process_cpu_seconds_total there")
	}
	s.cpu += time.Duration(cpu * float64(time.Second))
	s.rssBytes += values["process_resident_memory_bytes"]
	return nil
}

// parseMetrics reads the samples without labels of Prometheus' text format.
// Other lines are passed over.
func parseMetrics(r io.Reader) (map[string]float64, error) {
	values := map[string]float64{}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20) // label values can be long
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		if v, err := strconv.ParseFloat(fields[1], 64); err == nil {
			values[fields[0]] = v
		}
	}
	return values, lines.Err()
}

// addProcess adds what /proc tells of a process.
func (s *sample) addProcess(pid int) error {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return err
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err == nil { // only the same user or root may look
		s.descriptors += float64(len(fds))
	}
	return s.addStat(string(stat))
}

// addStat adds a line of /proc/pid/stat (proc_pid_stat(5)).
func (s *sample) addStat(stat string) error {
	// The second field is a name in brackets, and may hold anything.
	_, rest, ok := strings.Cut(stat[max(strings.LastIndexByte(stat, ')'), 0):], ") ")
	fields := strings.Fields(rest)
	const state, utime, stime, cutime, cstime, rss = 3, 14, 15, 16, 17, 24
	if !ok || len(fields) <= rss-state {
		return errors.New("stat line has too few fields")
	}
	var n [rss + 1]int64
	for _, i := range []int{utime, stime, cutime, cstime, rss} {
		v, err := strconv.ParseInt(fields[i-state], 10, 64)
		if err != nil {
			return fmt.Errorf("stat field %d: %w", i, err)
		}
		n[i] = v
	}
	const tick = time.Second / ticksPerSecond
	s.cpu += time.Duration(n[utime]+n[stime]) * tick
	s.children += time.Duration(n[cutime]+n[cstime]) * tick
	s.rssBytes += float64(n[rss]) * float64(os.Getpagesize())
	return nil
}
