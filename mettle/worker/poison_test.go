//go:build linux

package worker_test

import (
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
)

// What an action does wrong is its own fault: handed from worker to worker, it
// would shut the gate of each.
func TestWorker_faultsOfActions(t *testing.T) {
	long := strings.Repeat("d", 200)
	deep := long + strings.Repeat("/"+long, 18) // 3,800 bytes
	for _, row := range []struct {
		name string
		make func(f *fixture) request
	}{
		{"symlink target too long", func(*fixture) request {
			return request{script: "true", root: &repb.Directory{Symlinks: []*repb.SymlinkNode{{Name: "l", Target: deep + deep}}}}
		}},
		{"working directory behind a dangling symlink", func(*fixture) request {
			return request{script: "true", command: &repb.Command{WorkingDirectory: "l/x"}, root: &repb.Directory{Symlinks: []*repb.SymlinkNode{{Name: "l", Target: "/nowhere"}}}}
		}},
		{"working directory is a dangling symlink", func(*fixture) request {
			return request{script: "true", command: &repb.Command{WorkingDirectory: "l"}, root: &repb.Directory{Symlinks: []*repb.SymlinkNode{{Name: "l", Target: "l"}}}}
		}},
		{"removes its root", func(*fixture) request {
			return request{script: "cd /; rm -rf $OLDPWD", command: &repb.Command{OutputPaths: []string{"x"}}}
		}},
		{"moves its root", func(*fixture) request {
			return request{script: "cd /; mv $OLDPWD $OLDPWD.x; ln -s /etc $OLDPWD", command: &repb.Command{OutputPaths: []string{"passwd"}}}
		}},
		{"arguments too long", func(*fixture) request {
			return request{command: &repb.Command{Arguments: []string{"/bin/true", strings.Repeat("x", 3<<20)}}}
		}},
		{"deep output", func(*fixture) request {
			return request{script: "mkdir out; cd out; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25; do mkdir " + long + "; cd " + long + "; echo x >f; done", command: &repb.Command{OutputPaths: []string{"out"}}}
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			f := newFixture(t, sameUser, func(_ *worker.Options, q *mem.Options) { q.MaxAttempts = 1 }).start(t)
			resp := f.execute(t, row.make(f))
			switch codes.Code(resp.GetStatus().GetCode()) { //nolint:exhaustive // the others are not the action's
			case codes.OK, codes.InvalidArgument, codes.FailedPrecondition:
			default:
				t.Errorf("status %.300v", resp.GetStatus())
			}
			f.run(t, request{script: "true"}, 0)
		})
	}
}
