package tracing

// Waiting reports whether spans wait to be sent, or are being sent.
func (t *Tracer) Waiting() bool { return t.queue.waiting.Load() > 0 }
