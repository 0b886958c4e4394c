package operation

// State is that of w's operation, whether or not its name was cancelled.
func State(w *Wait) *Snapshot { return &w.op.view.Load().Snapshot }

// Text is the name by which w waits.
func Text(w *Wait) string { return w.text }

// Names counts the names of w's operation beside its first.
func Names(w *Wait) int { return len(w.op.others) }
