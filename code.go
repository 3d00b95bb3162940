package postrider

import "fmt"

// Code is the class of an error: gRPC's seventeen codes with gRPC's numbers, names and meanings. A Code is itself an
// error, so that errors.Is(err, postrider.Unavailable) asks for the class of any error, also of one that came over the
// wire or out of a table.
type Code uint32

// The codes of gRPC. See https://grpc.io/docs/guides/status-codes/ for who returns what; the comments say what a
// Postrider user should do.
const (
	OK                 Code = 0  // no error
	Canceled           Code = 1  // the caller gave up
	Unknown            Code = 2  // an error without a class, retried
	InvalidArgument    Code = 3  // the request is wrong whatever the state: mend it, do not retry
	DeadlineExceeded   Code = 4  // time ran out; it may have run
	NotFound           Code = 5  // no such thing
	AlreadyExists      Code = 6  // there is one already, or the key was used for something else
	PermissionDenied   Code = 7  // not allowed, also when NATS permissions refuse the subject
	ResourceExhausted  Code = 8  // too large, too many, too fast, no space
	FailedPrecondition Code = 9  // refused in this state: the business "no"
	Aborted            Code = 10 // lost a race: read again and retry
	OutOfRange         Code = 11 // past the end
	Unimplemented      Code = 12 // nobody serves this method
	Internal           Code = 13 // a broken invariant, or a handler that panicked
	Unavailable        Code = 14 // nobody there right now: retry with backoff
	DataLoss           Code = 15 // unrecoverable loss or corruption
	Unauthenticated    Code = 16 // no valid credentials
)

// codeNames are the canonical upper-case names, as they stand on the wire.
var codeNames = [...]string{
	"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
	"PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
	"INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
}

// String returns the canonical name, for example "NOT_FOUND".
func (c Code) String() string {
	if int(c) < len(codeNames) {
		return codeNames[c]
	}
	return fmt.Sprintf("CODE_%d", uint32(c))
}

// Error makes a Code an error, the target of errors.Is.
func (c Code) Error() string { return c.String() }

// ParseCode reads a canonical name. A name that is not known is [Unknown] and false.
func ParseCode(name string) (Code, bool) {
	for i, n := range codeNames {
		if n == name {
			return Code(i), true
		}
	}
	return Unknown, false
}

// retryable says if an error of this class may go away when the same thing is tried again.
func (c Code) retryable() bool {
	switch c {
	case Canceled, Unknown, DeadlineExceeded, ResourceExhausted, Aborted, Internal, Unavailable:
		return true
	default:
		return false
	}
}
