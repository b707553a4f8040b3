package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"
)

// strict is an export that refuses what no server may ask of one.
type strict struct {
	t    testing.TB
	size uint64
}

func (s strict) Size() uint64 { return s.size }

func (s strict) within(off, length uint64) {
	if length == 0 || length > statusSpan || off > s.size || length > s.size-off {
		s.t.Errorf("asked for %d bytes at %d of %d", length, off, s.size)
	}
}

func (s strict) ReadAt(_ context.Context, p []byte, off uint64) error {
	s.within(off, uint64(len(p)))
	for i := range p {
		p[i] = byte(off) + byte(i)
	}
	return nil
}

func (s strict) Extents(_ context.Context, off, length uint64, fn func(Extent) error) error {
	s.within(off, length)
	return fn(Extent{off, length, 0})
}

// converse sends bytes to a server, and returns what it says until it hangs up
// or has said enough.
func converse(t testing.TB, e Export, said []byte, enough int) []byte {
	here, there := net.Pipe()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		NewServer("vda", e, 0).serve(context.Background(), there)
	}()
	go func() {
		_, _ = here.Write(said)
		if enough == 0 {
			time.Sleep(time.Millisecond)
			_ = here.Close()
		}
	}()
	var heard []byte
	if enough > 0 {
		_ = here.SetReadDeadline(time.Now().Add(10 * time.Second))
		heard = make([]byte, enough)
		n, _ := io.ReadFull(here, heard)
		heard = heard[:n]
		_ = here.Close()
	} else {
		_, _ = io.Copy(io.Discard, here)
	}
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Fatal("the server does not end")
	}
	return heard
}

func optionBytes(code uint32, data []byte) []byte {
	return append(numbers(uint64(magicOption), code, uint32(len(data))), data...)
}

func requestBytes(command, flags uint16, cookie, off uint64, length uint32) []byte {
	return numbers(uint32(magicRequest), flags, command, cookie, off, length)
}

// TestPlainClient speaks as the oldest clients do: EXPORT_NAME, zeroes behind
// the export, simple replies.
func TestPlainClient(t *testing.T) {
	said := bytes.Join([][]byte{
		numbers(uint32(flagFixedNewstyle)), optionBytes(5, nil), optionBytes(optExportName, []byte("vda")),
		requestBytes(commandRead, 0, 7, 3, 4), requestBytes(commandWrite, 0, 8, 0, 5), []byte("write"), requestBytes(commandRead, 0, 9, 4096, 1),
	}, nil)
	heard := converse(t, strict{t, 4096}, said, 18+20+8+2+124+16+4+16+16)
	want := bytes.Join([][]byte{
		numbers(uint64(magicServer), uint64(magicOption), uint16(3)),
		numbers(uint64(magicOptReply), uint32(5), uint32(replyUnsupported), uint32(0)),
		numbers(uint64(4096), uint16(flagHasFlags|flagReadOnly|flagMultiConn)), make([]byte, 124),
	}, nil)
	if !bytes.HasPrefix(heard, want) {
		t.Fatalf("negotiation:\n%x\nwant\n%x", heard, want)
	}
	replies := heard[len(want):]
	for _, reply := range [][]byte{ // in any order
		append(numbers(uint32(magicSimple), uint32(0), uint64(7)), 3, 4, 5, 6),
		numbers(uint32(magicSimple), uint32(syscall.EPERM), uint64(8)),
		numbers(uint32(magicSimple), uint32(syscall.EINVAL), uint64(9)),
	} {
		if !bytes.Contains(replies, reply) {
			t.Errorf("reply %x is missing in %x", reply, replies)
		}
	}
}

func TestCheckRequest(t *testing.T) {
	const size = 1 << 40
	for name, test := range map[string]struct {
		asked
		structured, mapped bool
		want               syscall.Errno
	}{
		"read":                {asked: asked{length: 1}},
		"to the end":          {asked: asked{offset: size - 5, length: 5}},
		"nothing":             {asked: asked{offset: 5}, want: syscall.EINVAL},
		"beyond":              {asked: asked{offset: size - 5, length: 6}, want: syscall.EINVAL},
		"far beyond":          {asked: asked{offset: ^uint64(0), length: 2}, want: syscall.EINVAL},
		"the most":            {asked: asked{length: maximumSize}},
		"too much":            {asked: asked{length: maximumSize + 1}, want: syscall.EOVERFLOW},
		"in one piece":        {asked: asked{flags: commandFlagDF, length: 1}, structured: true},
		"DF, not structured":  {asked: asked{flags: commandFlagDF, length: 1}, want: syscall.EINVAL},
		"FUA":                 {asked: asked{flags: 1, length: 1}, structured: true, want: syscall.EINVAL},
		"write":               {asked: asked{command: commandWrite, length: 1}, want: syscall.EPERM},
		"trim":                {asked: asked{command: commandTrim, length: 1}, want: syscall.EPERM},
		"zero":                {asked: asked{command: commandWriteZeroes, length: 1}, want: syscall.EPERM},
		"flush":               {asked: asked{command: 3}, want: syscall.EINVAL},
		"unknown":             {asked: asked{command: 999, length: 1}, want: syscall.EINVAL},
		"status":              {asked: asked{command: commandBlockStatus, flags: commandFlagOne, length: ^uint32(0)}, structured: true, mapped: true},
		"status, not offered": {asked: asked{command: commandBlockStatus, length: 1}, structured: true, want: syscall.EINVAL},
	} {
		if got := test.check(size, test.structured, test.mapped); got != test.want {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
}

// TestHangsUp ends with those who do not speak the protocol.
func TestHangsUp(t *testing.T) {
	choose := append(numbers(uint32(3)), optionBytes(optExportName, []byte("vda"))...)
	for name, said := range map[string][]byte{
		"flags":           numbers(uint32(0xff)),
		"no newstyle":     numbers(uint32(2)),
		"magic of option": append(numbers(uint32(3)), numbers(uint64(1), uint32(7), uint32(0))...),
		"long option":     append(numbers(uint32(3)), numbers(uint64(magicOption), uint32(7), uint32(1<<30))...),
		"unknown export":  append(numbers(uint32(3)), optionBytes(optExportName, []byte("vdb"))...),
		"abort":           append(numbers(uint32(3)), optionBytes(optAbort, nil)...),
		"magic":           append(choose, make([]byte, requestSize)...),
		"endless write":   append(choose, requestBytes(commandWrite, 0, 1, 0, ^uint32(0))...),
		"disconnect":      append(choose, requestBytes(commandDisconnect, 0, 1, 0, 0)...),
	} {
		here, there := net.Pipe()
		go NewServer("vda", strict{t, 4096}, 0).serve(context.Background(), there)
		go func() { _, _ = here.Write(said) }()
		_ = here.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.Copy(io.Discard, here); err != nil {
			t.Errorf("%s: it does not hang up: %v", name, err)
		}
		_ = here.Close()
	}
}

// FuzzServer has a client say anything. strict sees what comes of it.
func FuzzServer(f *testing.F) {
	start := numbers(uint32(3))
	goData := append(appendString(nil, "vda"), 0, 1, 0, 3)
	meta := append(appendString(nil, "vda"), numbers(uint32(1))...)
	meta = appendString(meta, ContextAllocation)
	talk := bytes.Join([][]byte{start, optionBytes(optStructuredReply, nil), optionBytes(optSetMetaContext, meta), optionBytes(optGo, goData),
		requestBytes(commandRead, 0, 1, 100, 512), requestBytes(commandBlockStatus, 0, 2, 0, 4096), requestBytes(commandDisconnect, 0, 3, 0, 0)}, nil)
	f.Add(talk)
	f.Add(append(start, optionBytes(optList, nil)...))
	f.Add(append(start, optionBytes(optListMetaContext, meta)...))
	f.Add(bytes.Join([][]byte{start, optionBytes(optExportName, nil), requestBytes(commandWrite, 0, 1, 0, 3), []byte("abc"), requestBytes(commandRead, 0, 2, 4095, 1)}, nil))
	f.Fuzz(func(t *testing.T, said []byte) { converse(t, strict{t, 4096}, said, 0) })
}

// FuzzRequest holds what is let pass against the export's bounds.
func FuzzRequest(f *testing.F) {
	f.Add(requestBytes(commandRead, 0, 1, 100, 512), uint64(4096), true, true)
	f.Add(requestBytes(commandBlockStatus, 8, 1, 1<<63, 1<<31), uint64(1<<63), true, false)
	f.Fuzz(func(t *testing.T, head []byte, size uint64, structured, mapped bool) {
		if len(head) != requestSize {
			return
		}
		a, err := parseRequest((*[requestSize]byte)(head))
		if (err == nil) != (binary.BigEndian.Uint32(head) == magicRequest) || err != nil && !errors.Is(err, errProtocol) {
			t.Fatal(err)
		}
		if a.check(size, structured, mapped) == 0 && (a.length == 0 || a.offset+uint64(a.length) > size || a.offset+uint64(a.length) < a.offset) {
			t.Errorf("%+v passes for %d bytes", a, size)
		}
	})
}

func TestOptionsAreParsed(t *testing.T) {
	name := appendString(nil, "vda")
	for data, ok := range map[string]bool{
		"": false, string(name): false, string(name) + "\x00\x00": true, string(name) + "\x00\x01\x00\x03": true,
		string(name) + "\x00\x02\x00\x03": false, string(name) + "\x00\x00x": false, "\xff\xff\xff\xffvda\x00\x00": false, "\x00\x00\x10\x01": false,
	} {
		if got, good := parseInfo([]byte(data)); good != ok || ok && got != "vda" {
			t.Errorf("%q: %q, %t", data, got, good)
		}
	}
	for data, count := range map[string]int{
		string(name): -1, string(name) + "\x00\x00\x00\x00": 0, string(name) + "\x00\x00\x00\x01\x00\x00\x00\x01a": 1,
		string(name) + "\x00\x00\x00\x02\x00\x00\x00\x01a": -1, string(name) + "\x00\x00\x00\x01\x00\x00\x00\x02a": -1, string(name) + "\xff\xff\xff\xff": -1,
	} {
		if _, queries, ok := parseMetaContexts([]byte(data)); ok != (count >= 0) || ok && len(queries) != count {
			t.Errorf("%q: %q, %t", data, queries, ok)
		}
	}
}
