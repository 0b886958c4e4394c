package operation

// State is that of w's operation, whether or not its name was cancelled.
func State(w *Wait) *Snapshot { return &w.op.view.Load().Snapshot }
