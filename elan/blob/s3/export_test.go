package s3

// AnyChunk lets o have chunks that Amazon would not take.
func (o Options) AnyChunk() Options {
	o.anyChunk = true
	return o
}
