package asset_test

import (
	"bytes"
	"compress/zlib"
	"crypto/sha1" //nolint:gosec // what git uses
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/elan/asset"
)

// gitPack is a pack that is being made.
type gitPack struct {
	bytes.Buffer
	n uint32
}

// The types of objects in packs.
const (
	packedCommit   = 1
	packedTree     = 2
	packedBlob     = 3
	packedRefDelta = 7
)

// add adds an object, of which between is what stands before the compressed data,
// and returns its id, if it is no delta.
func (p *gitPack) add(t *testing.T, kind int, between, data []byte) [20]byte {
	t.Helper()
	p.n++
	size := len(data)
	b := byte(kind<<4 | size&15)
	for size >>= 4; size > 0; size >>= 7 {
		p.WriteByte(b | 0x80)
		b = byte(size & 0x7f)
	}
	p.WriteByte(b)
	p.Write(between)
	z := zlib.NewWriter(&p.Buffer)
	if _, err := z.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	name := map[int]string{packedCommit: "commit", packedTree: "tree", packedBlob: "blob"}[kind]
	return sha1.Sum(fmt.Appendf(nil, "%s %d\x00%s", name, len(data), data)) //nolint:gosec // as above
}

// pack is the pack as it is sent.
func (p *gitPack) pack() []byte {
	b := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32([]byte("PACK"), 2), p.n)
	b = append(b, p.Bytes()...)
	sum := sha1.Sum(b) //nolint:gosec // as above
	return append(b, sum[:]...)
}

// serveGitPack serves a repository of one commit, in the first version of the
// protocol, whatever is asked for.
func serveGitPack(commit string, pack []byte) http.HandlerFunc {
	line := func(s string) string { return fmt.Sprintf("%04x%s", len(s)+4, s) }
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			w.Header().Set("Content-Type", "application/x-git-upload-pack-advertisement")
			_, _ = io.WriteString(w, line("# service=git-upload-pack\n")+"0000"+line(commit+" HEAD\x00shallow\n")+line(commit+" refs/heads/main\n")+"0000")
			return
		}
		asked, _ := io.ReadAll(r.Body)
		w.Header().Set("Content-Type", "application/x-git-upload-pack-result")
		_, _ = io.WriteString(w, line("shallow "+commit)+"0000")
		if strings.Contains(string(asked), "done") {
			_, _ = io.WriteString(w, line("NAK\n")+string(pack))
		}
	}
}

// TestFetchDirectory_gitBomb: a few kilobytes may say that an object has gigabytes,
// which git holds in memory.
func TestFetchDirectory_gitBomb(t *testing.T) {
	newGitRepo(t) // which skips the test where there is no git
	p := &gitPack{}
	base := make([]byte, 1<<20)
	id := p.add(t, packedBlob, nil, base)
	const copies = 1500 // of a MiB each, less a byte
	delta := binary.AppendUvarint(binary.AppendUvarint(nil, uint64(len(base))), copies*0xfffff)
	for range copies {
		delta = append(delta, 0xf0, 0xff, 0xff, 0x0f) // from 0 on, 0x0fffff bytes
	}
	p.add(t, packedRefDelta, id[:], delta)
	tree := p.add(t, packedTree, nil, append([]byte("100644 zeros\x00"), id[:]...))
	commit := p.add(t, packedCommit, nil, fmt.Appendf(nil, "tree %x\nauthor a <a@b> 1 +0000\ncommitter a <a@b> 1 +0000\n\nx\n", tree))
	o := newSite(t, serveGitPack(hex.EncodeToString(commit[:]), p.pack()))
	a := newService(t, nil, asset.Options{})
	_, err := a.FetchDirectory(t.Context(), request(o.URL+"/repo.git"))
	wantReason(t, err, asset.TooLarge, "over limit")
}
