package rpc

import "google.golang.org/grpc/mem"

// SetPool makes p the pool of the buffers that blobs are read into.
func SetPool(o *Options, p mem.BufferPool) { o.pool = p }
