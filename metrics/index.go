package metrics

import (
	"bytes"
	"context"
	_ "embed"
	"html/template"
	"net/http"
)

// A Page is served beside those of this package, and the index page links it.
type Page struct {
	Path    string // such as /storage.json
	Note    string // what it is, in a few words
	Handler http.Handler
}

// A Table is a part of the index page.
type Table struct {
	Title string
	Rows  []Row
}

// A Row is one figure, as people read it.
type Row struct {
	Name, Value string
	Note        string // what it means, or empty
}

//go:embed index.html
var indexHTML string

func parseIndex() (*template.Template, error) { return template.New("index").Parse(indexHTML) }

// serveIndex answers with the tables, whether the process is ready, and what
// else there is.
func (s *Server) serveIndex(w http.ResponseWriter, r *http.Request) {
	page := struct {
		Name, Ready, Trouble string
		Notes                []string
		Tables               []Table
		Pages                []Page
	}{Name: s.name, Pages: s.pages}
	ctx, cancel := context.WithTimeout(r.Context(), readyTimeout)
	defer cancel()
	if err := s.ready(ctx); err != nil {
		page.Ready = err.Error()
	} else {
		page.Notes = s.notes()
	}
	if s.table != nil {
		var err error
		if page.Tables, err = s.table(ctx); err != nil {
			page.Trouble = err.Error()
		}
	}
	process, err := processTable(s.reg, s.version)
	if err != nil {
		page.Trouble = err.Error()
	}
	page.Tables = append(page.Tables, process)
	// To memory first: an error must not follow half a page.
	var b bytes.Buffer
	if err := s.index.Execute(&b, page); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	_, _ = b.WriteTo(w) // the client may have gone
}
