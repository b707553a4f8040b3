package nbd

import (
	"fmt"
	"syscall"
)

// Numbers of the NBD protocol (doc/proto.md of the reference implementation,
// chapters "Newstyle negotiation", "Option types", "Structured reply types").
const (
	magicServer     = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicOptReply   = 0x0003e889045565a9
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef

	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1

	// Of an export.
	flagHasFlags  = 1 << 0
	flagReadOnly  = 1 << 1
	flagSendDF    = 1 << 7
	flagMultiConn = 1 << 8

	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMetaContext = 9
	optSetMetaContext  = 10

	replyAck         = 1
	replyServer      = 2
	replyInfo        = 3
	replyMetaContext = 4
	replyErrorBit    = 1 << 31
	replyUnsupported = replyErrorBit | 1
	replyInvalid     = replyErrorBit | 3
	replyUnknown     = replyErrorBit | 6

	infoExport    = 0
	infoBlockSize = 3

	commandRead        = 0
	commandWrite       = 1
	commandDisconnect  = 2
	commandTrim        = 4
	commandWriteZeroes = 6
	commandBlockStatus = 7

	commandFlagDF  = 1 << 2 // do not fragment
	commandFlagOne = 1 << 3 // one extent only

	chunkDone        = 1 << 0
	chunkNone        = 0
	chunkOffsetData  = 1
	chunkOffsetHole  = 2
	chunkBlockStatus = 5
	chunkErrorBit    = 1 << 15
	chunkError       = chunkErrorBit | 1
	chunkErrorOffset = chunkErrorBit | 2
)

const (
	// maxString is the protocol's limit for names and messages.
	maxString = 4096
	// maxOptionReply bounds what a server may make us hold during negotiation.
	maxOptionReply = 64 << 10
	// maxOptionReplies bounds how many replies one option may have.
	maxOptionReplies = 256
	// defaultMaximum is the request size that a server must accept when it
	// says nothing about block sizes.
	defaultMaximum = 32 << 20
	// maxStatusPayload bounds one block status chunk: the protocol's limit of
	// 2^20 descriptors of 8 bytes, and the context's number.
	maxStatusPayload = 4 + 8<<20
	// statusSpan is the range that one block status request asks for: small
	// enough that the answer for a fragmented disk stays small.
	statusSpan = 1 << 30
	// maxInFlight bounds the requests on the connection. Their headers fit
	// into a socket's buffer, so sending never waits for the server.
	maxInFlight = 64
)

var optionErrors = map[uint32]string{
	1: "not supported", 2: "refused by policy", 3: "invalid request", 4: "not supported on this platform",
	5: "TLS required", 6: "unknown export", 7: "server is shutting down", 8: "block size required", 9: "request too big",
}

// optionError is a negative answer to an option during negotiation.
type optionError struct {
	option string
	code   uint32 // NBD_REP_ERR_* without its highest bit
	text   string // what the server said about it; may be empty
}

func (e *optionError) Error() string {
	reason, ok := optionErrors[e.code]
	if !ok {
		reason = fmt.Sprintf("error %d", e.code)
	}
	if e.text == "" {
		return fmt.Sprintf("server refuses %s: %s", e.option, reason)
	}
	return fmt.Sprintf("server refuses %s: %s (%q)", e.option, reason, e.text)
}

// ServerError is a request that the server could not fulfil. The connection
// goes on. It unwraps to the errno.
type ServerError struct {
	Errno   syscall.Errno // NBD's error numbers are Linux's
	Message string        // the server's words; may be empty
}

func (e *ServerError) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("server reports %v", e.Errno)
	}
	return fmt.Sprintf("server reports %v (%q)", e.Errno, e.Message)
}

func (e *ServerError) Unwrap() error { return e.Errno }
