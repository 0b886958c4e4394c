package wire

// ActsForHeader is metadata of a call that one server makes in its own name for
// somebody else: the name of whom it is for, as the first server knows it. It counts
// where the caller may act for others (creds), and is taken away everywhere else.
const ActsForHeader = "mettle-acts-for-bin"
