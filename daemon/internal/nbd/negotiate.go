package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
)

// negotiate brings the connection into the transmission phase.
func negotiate(r io.Reader, w io.Writer, o Options) (export, error) {
	e := export{minimum: 1, preferred: 4096, maximum: defaultMaximum, contexts: map[string]uint32{}}
	if len(o.Export) > maxString {
		return e, errors.New("export name is too long")
	}
	if err := greet(r, w); err != nil {
		return e, err
	}
	n := negotiation{r: r, w: w}
	if err := n.option(optStructuredReply, "structured replies", nil, nil); err != nil {
		return e, err
	}
	if len(o.Contexts) > 0 {
		if err := n.metaContexts(o, &e); err != nil {
			return e, err
		}
	}
	return e, n.goExport(o.Export, &e)
}

// greet exchanges the first flags.
func greet(r io.Reader, w io.Writer) error {
	var hello [18]byte
	if _, err := io.ReadFull(r, hello[:]); err != nil {
		return fmt.Errorf("cannot read the server's greeting: %w", err)
	}
	if binary.BigEndian.Uint64(hello[:]) != magicServer || binary.BigEndian.Uint64(hello[8:]) != magicOption {
		return errors.New("not an NBD server of the newstyle")
	}
	offered := binary.BigEndian.Uint16(hello[16:])
	if offered&flagFixedNewstyle == 0 {
		return errors.New("server does not speak fixed newstyle")
	}
	flags := uint32(offered & (flagFixedNewstyle | flagNoZeroes))
	if err := binary.Write(w, binary.BigEndian, flags); err != nil {
		return fmt.Errorf("cannot answer the server's greeting: %w", err)
	}
	return nil
}

type negotiation struct {
	r io.Reader
	w io.Writer
}

// option sends an option and calls fn for each reply before the final one.
func (n negotiation) option(code uint32, name string, data []byte, fn func(kind uint32, payload []byte) error) error {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, code)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	if _, err := n.w.Write(append(b, data...)); err != nil {
		return fmt.Errorf("cannot ask for %s: %w", name, err)
	}
	for range maxOptionReplies {
		kind, payload, err := n.reply(code)
		switch {
		case err != nil:
			return fmt.Errorf("bad answer to %s: %w", name, err)
		case kind&replyErrorBit != 0:
			return &optionError{option: name, code: kind &^ replyErrorBit, text: string(payload[:min(len(payload), maxString)])}
		case kind == replyAck:
			return nil
		case fn == nil:
			return fmt.Errorf("bad answer to %s: unexpected reply type %d", name, kind)
		}
		if err := fn(kind, payload); err != nil {
			return fmt.Errorf("bad answer to %s: %w", name, err)
		}
	}
	return fmt.Errorf("bad answer to %s: too many replies", name)
}

func (n negotiation) reply(code uint32) (kind uint32, payload []byte, err error) {
	var head [20]byte
	if _, err := io.ReadFull(n.r, head[:]); err != nil {
		return 0, nil, err
	}
	kind = binary.BigEndian.Uint32(head[12:])
	length := binary.BigEndian.Uint32(head[16:])
	switch {
	case binary.BigEndian.Uint64(head[:]) != magicOptReply:
		return 0, nil, errors.New("wrong magic number")
	case binary.BigEndian.Uint32(head[8:]) != code:
		return 0, nil, errors.New("answer to another option")
	case length > maxOptionReply:
		return 0, nil, fmt.Errorf("reply of %d bytes is too long", length)
	}
	payload = make([]byte, length)
	_, err = io.ReadFull(n.r, payload)
	return kind, payload, err
}

func (n negotiation) metaContexts(o Options, e *export) error {
	data := appendString(nil, o.Export)
	data = binary.BigEndian.AppendUint32(data, uint32(len(o.Contexts)))
	for _, name := range o.Contexts {
		data = appendString(data, name)
	}
	err := n.option(optSetMetaContext, "metadata contexts", data, func(kind uint32, payload []byte) error {
		if kind != replyMetaContext || len(payload) < 4 {
			return fmt.Errorf("unexpected reply type %d of %d bytes", kind, len(payload))
		}
		name := string(payload[4:])
		if !slices.Contains(o.Contexts, name) {
			return fmt.Errorf("context %.80q was not asked for", name)
		}
		e.contexts[name] = binary.BigEndian.Uint32(payload)
		return nil
	})
	if err != nil {
		return err
	}
	for _, name := range o.Contexts {
		if _, ok := e.contexts[name]; !ok {
			return fmt.Errorf("server does not offer metadata context %q", name)
		}
	}
	return nil
}

func (n negotiation) goExport(name string, e *export) error {
	data := appendString(nil, name)
	data = binary.BigEndian.AppendUint16(data, 1)
	data = binary.BigEndian.AppendUint16(data, infoBlockSize)
	sized := false
	err := n.option(optGo, "the export", data, func(kind uint32, payload []byte) error {
		if kind != replyInfo || len(payload) < 2 {
			return fmt.Errorf("unexpected reply type %d of %d bytes", kind, len(payload))
		}
		switch binary.BigEndian.Uint16(payload) {
		case infoExport:
			if len(payload) != 12 {
				return errors.New("malformed export information")
			}
			e.size, sized = binary.BigEndian.Uint64(payload[2:]), true
		case infoBlockSize:
			if len(payload) != 14 {
				return errors.New("malformed block sizes")
			}
			e.minimum = binary.BigEndian.Uint32(payload[2:])
			e.preferred = binary.BigEndian.Uint32(payload[6:])
			e.maximum = binary.BigEndian.Uint32(payload[10:])
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case !sized:
		return errors.New("server did not tell the export's size")
	case e.size > math.MaxInt64:
		return fmt.Errorf("export of %d bytes is too big", e.size)
	}
	return e.checkBlockSizes()
}

// checkBlockSizes holds the server to chapter "Block size constraints".
func (e *export) checkBlockSizes() error {
	m := e.minimum
	if m == 0 || m&(m-1) != 0 || m > 64<<10 || e.maximum < m {
		return fmt.Errorf("server's block sizes %d, %d, %d make no sense", e.minimum, e.preferred, e.maximum)
	}
	// Bigger requests would gain nothing; a maximum that is not a multiple of
	// the minimum (0xffffffff is allowed) could not be used as it is.
	e.maximum = min(e.maximum, defaultMaximum)
	e.maximum -= e.maximum % m
	return nil
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}
