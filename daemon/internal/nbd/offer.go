package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// offer is the server's side of a negotiation.
type offer struct {
	*Server
	r io.Reader
	w io.Writer

	noZeroes   bool
	structured bool
	mapped     bool // ContextAllocation was chosen
}

// maxOptions bounds how long a client may haggle.
const maxOptions = 1000

var (
	errAborted  = errors.New("client has ended the negotiation")
	errProtocol = errors.New("client does not keep to the protocol")
)

// negotiate returns when the client has chosen the export. An error ends the
// connection.
func (o *offer) negotiate() error {
	hello := binary.BigEndian.AppendUint64(nil, magicServer)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	hello = binary.BigEndian.AppendUint16(hello, flagFixedNewstyle|flagNoZeroes)
	if _, err := o.w.Write(hello); err != nil {
		return err
	}
	var b [4]byte
	if _, err := io.ReadFull(o.r, b[:]); err != nil {
		return err
	}
	flags := binary.BigEndian.Uint32(b[:])
	if flags&^(flagFixedNewstyle|flagNoZeroes) != 0 || flags&flagFixedNewstyle == 0 {
		return fmt.Errorf("%w: flags %#x", errProtocol, flags)
	}
	o.noZeroes = flags&flagNoZeroes != 0
	for range maxOptions {
		code, data, err := o.option()
		if err != nil {
			return err
		}
		if chosen, err := o.answer(code, data); chosen || err != nil {
			return err
		}
	}
	return fmt.Errorf("%w: too many options", errProtocol)
}

// option reads the next one.
func (o *offer) option() (code uint32, data []byte, err error) {
	var head [16]byte
	if _, err := io.ReadFull(o.r, head[:]); err != nil {
		return 0, nil, err
	}
	length := binary.BigEndian.Uint32(head[12:])
	if binary.BigEndian.Uint64(head[:]) != magicOption || length > maxOptionReply {
		return 0, nil, fmt.Errorf("%w: option of %d bytes", errProtocol, length)
	}
	data = make([]byte, length)
	_, err = io.ReadFull(o.r, data)
	return binary.BigEndian.Uint32(head[8:]), data, err
}

// answer answers one option; chosen ends the negotiation.
func (o *offer) answer(code uint32, data []byte) (chosen bool, err error) {
	switch code {
	case optExportName:
		return true, o.exportName(string(data))
	case optAbort:
		_ = o.reply(code, replyAck, nil)
		return false, errAborted
	case optList:
		if len(data) > 0 {
			return false, o.reply(code, replyInvalid, nil)
		}
		return false, errors.Join(o.reply(code, replyServer, appendString(nil, o.name)), o.reply(code, replyAck, nil))
	case optInfo, optGo:
		return o.info(code, data)
	case optStructuredReply:
		if len(data) > 0 {
			return false, o.reply(code, replyInvalid, nil)
		}
		o.structured = true
		return false, o.reply(code, replyAck, nil)
	case optListMetaContext, optSetMetaContext:
		return false, o.metaContexts(code, data)
	}
	return false, o.reply(code, replyUnsupported, nil)
}

func (o *offer) reply(code, kind uint32, payload []byte) error {
	b := binary.BigEndian.AppendUint64(nil, magicOptReply)
	b = binary.BigEndian.AppendUint32(b, code)
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	_, err := o.w.Write(append(b, payload...))
	return err
}

func (o *offer) known(name string) bool { return name == o.name || name == "" }

// exportName is the old way to choose, which has no answer but the export itself.
func (o *offer) exportName(name string) error {
	if !o.known(name) {
		return fmt.Errorf("%w: unknown export", errProtocol)
	}
	b := binary.BigEndian.AppendUint64(nil, o.export.Size())
	b = binary.BigEndian.AppendUint16(b, o.flags(o.structured))
	if !o.noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	_, err := o.w.Write(b)
	return err
}

func (o *offer) info(code uint32, data []byte) (chosen bool, err error) {
	name, ok := parseInfo(data)
	switch {
	case !ok:
		return false, o.reply(code, replyInvalid, nil)
	case !o.known(name):
		return false, o.reply(code, replyUnknown, nil)
	}
	about := binary.BigEndian.AppendUint16(nil, infoExport)
	about = binary.BigEndian.AppendUint64(about, o.export.Size())
	about = binary.BigEndian.AppendUint16(about, o.flags(o.structured))
	sizes := binary.BigEndian.AppendUint16(nil, infoBlockSize)
	for _, n := range []uint32{1, preferredSize, maximumSize} {
		sizes = binary.BigEndian.AppendUint32(sizes, n)
	}
	err = errors.Join(o.reply(code, replyInfo, about), o.reply(code, replyInfo, sizes), o.reply(code, replyAck, nil))
	return code == optGo, err
}

// parseInfo takes an NBD_OPT_INFO or NBD_OPT_GO apart: a name, and the numbers
// of what the client would like to know, all of which it is told anyway.
func parseInfo(data []byte) (name string, ok bool) {
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 2 || len(rest) != 2+2*int(binary.BigEndian.Uint16(rest)) {
		return "", false
	}
	return name, true
}

func (o *offer) metaContexts(code uint32, data []byte) error {
	name, queries, ok := parseMetaContexts(data)
	_, mapper := o.export.(Mapper)
	switch {
	case !ok || !o.structured:
		return o.reply(code, replyInvalid, nil)
	case !o.known(name):
		return o.reply(code, replyUnknown, nil)
	}
	found := code == optListMetaContext && len(queries) == 0
	for _, q := range queries {
		found = found || q == ContextAllocation || code == optListMetaContext && q == "base:"
	}
	found = found && mapper
	if code == optSetMetaContext {
		o.mapped = found
	}
	if found {
		if err := o.reply(code, replyMetaContext, append(binary.BigEndian.AppendUint32(nil, allocationID), ContextAllocation...)); err != nil {
			return err
		}
	}
	return o.reply(code, replyAck, nil)
}

// allocationID is the number that ContextAllocation has on a connection.
const allocationID = 1

func parseMetaContexts(data []byte) (name string, queries []string, ok bool) {
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 4 {
		return "", nil, false
	}
	count := binary.BigEndian.Uint32(rest)
	for rest = rest[4:]; len(rest) > 0; {
		var q string
		if q, rest, ok = cutString(rest); !ok {
			return "", nil, false
		}
		queries = append(queries, q)
	}
	return name, queries, uint64(len(queries)) == uint64(count)
}

// cutString takes a string with its length before it off data.
func cutString(data []byte) (s string, rest []byte, ok bool) {
	if len(data) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(data)
	if n > maxString || int(n) > len(data)-4 {
		return "", nil, false
	}
	return string(data[4 : 4+n]), data[4+n:], true
}
