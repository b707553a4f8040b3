package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
)

// The server side of these tests is bytes, as no real server is that bad.

type message []byte

func structured(cookie uint64, flags, kind uint16, payload []byte) message {
	b := binary.BigEndian.AppendUint32(nil, magicStructured)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
}

func numbers(n ...any) (b []byte) {
	for _, v := range n {
		b, _ = binary.Append(b, binary.BigEndian, v)
	}
	return b
}

func data(off uint64, text string) []byte { return append(numbers(off), text...) }

// pipe gives a client of a 4096-byte export and the server's end of its
// connection.
func pipe(t testing.TB) (*Client, net.Conn) {
	here, there := net.Pipe()
	e := export{size: 4096, minimum: 1, maximum: defaultMaximum, contexts: map[string]uint32{"a": 5, "b": 6}}
	c := newClient(here, bufio.NewReader(here), e)
	t.Cleanup(func() { _ = there.Close(); _ = c.Close() })
	return c, there
}

// awaitRequest is how the server waits for a request.
func awaitRequest(server net.Conn) { _, _ = io.ReadFull(server, make([]byte, 28)) }

// play sends the script, each reply once its request has come, and hangs up.
func play(server net.Conn, script []message) {
	awaitRequest(server)
	for i, m := range script {
		if i > 0 && m[15] != script[i-1][15] {
			awaitRequest(server)
		}
		_, _ = server.Write(m)
	}
	_ = server.Close()
}

func TestRead(t *testing.T) {
	const at, length = 100, 8
	for name, test := range map[string]struct {
		reply []message
		want  string // the data, or a part of the error
	}{
		"one chunk":         {[]message{structured(1, 1, 1, data(100, "abcdefgh"))}, "abcdefgh"},
		"data, hole, none":  {[]message{structured(1, 0, 2, numbers(uint64(104), uint32(4))), structured(1, 0, 1, data(100, "abcd")), structured(1, 1, 0, nil)}, "abcd\x00\x00\x00\x00"},
		"three out of turn": {[]message{structured(1, 0, 1, data(106, "gh")), structured(1, 0, 1, data(100, "abc")), structured(1, 1, 1, data(103, "def"))}, "abcdefgh"},
		"nothing":           {[]message{structured(1, 1, 0, nil)}, "leaves out"},
		"a part":            {[]message{structured(1, 1, 1, data(100, "abcd"))}, "leaves out"},
		"overlap":           {[]message{structured(1, 0, 1, data(100, "abcde")), structured(1, 1, 1, data(104, "efgh"))}, "overlaps"},
		"before":            {[]message{structured(1, 1, 1, data(99, "abcdefgh"))}, "outside"},
		"behind":            {[]message{structured(1, 1, 1, data(101, "abcdefgh"))}, "outside"},
		"too long":          {[]message{structured(1, 1, 1, data(100, "abcdefghi"))}, "data chunk of 17 bytes"},
		"empty":             {[]message{structured(1, 1, 1, data(100, ""))}, "data chunk of 8 bytes"},
		"huge hole":         {[]message{structured(1, 1, 2, numbers(uint64(100), ^uint32(0)))}, "outside"},
		"hole overflows":    {[]message{structured(1, 1, 2, numbers(^uint64(0), uint32(8)))}, "outside"},
		"error":             {[]message{structured(1, 1, 0x8001, append(numbers(uint32(5), uint16(4)), "disk"...))}, `input/output error ("disk")`},
		"error with offset": {[]message{structured(1, 1, 0x8002, append(append(numbers(uint32(5), uint16(3)), "bad"...), numbers(uint64(104))...))}, "bad, at 104"},
		"error, then more":  {[]message{structured(1, 0, 0x8001, numbers(uint32(5), uint16(0))), structured(1, 1, 1, data(100, "abcdefgh"))}, "input/output"},
		"message too long":  {[]message{structured(1, 1, 0x8001, numbers(uint32(5), uint16(9)))}, "malformed error"},
		"error zero":        {[]message{structured(1, 1, 0x8001, numbers(uint32(0), uint16(0)))}, "malformed error"},
		"simple error":      {[]message{numbers(uint32(magicSimple), uint32(5), uint64(1))}, "input/output"},
		"simple success":    {[]message{numbers(uint32(magicSimple), uint32(0), uint64(1))}, "simple reply"},
		"status":            {[]message{structured(1, 1, 5, numbers(uint32(5), uint32(8), uint32(0)))}, "unexpected reply chunk"},
		"other cookie":      {[]message{structured(2, 1, 1, data(100, "abcdefgh"))}, "unknown request"},
		"wrong magic":       {[]message{make(message, 20)}, "wrong magic"},
		"cut short":         {[]message{structured(1, 1, 1, data(100, "abcdefgh"))[:30]}, "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			c, server := pipe(t)
			go play(server, test.reply)
			got := []byte("********")
			err := c.ReadAt(t.Context(), got, at)
			if err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want %q", err, test.want)
			}
			if err == nil && string(got) != test.want {
				t.Errorf("data is %q, want %q", got, test.want)
			}
		})
	}
}

func TestBlockStatus(t *testing.T) {
	for name, test := range map[string]struct {
		reply []message
		want  []Extent
		err   string
	}{
		"other context too": {[]message{structured(1, 0, 5, numbers(uint32(6), uint32(4096), uint32(9))), structured(1, 1, 5, numbers(uint32(5), uint32(4096), uint32(1)))}, []Extent{{0, 4096, 1}}, ""},
		"merged":            {[]message{structured(1, 1, 5, numbers(uint32(5), uint32(1024), uint32(1), uint32(1024), uint32(1), uint32(2048), uint32(0)))}, []Extent{{0, 2048, 1}, {2048, 2048, 0}}, ""},
		"last one overruns": {[]message{structured(1, 1, 5, numbers(uint32(5), uint32(1024), uint32(1), ^uint32(0), uint32(0)))}, []Extent{{0, 1024, 1}, {1024, 3072, 0}}, ""},
		"partial, twice":    {[]message{structured(1, 1, 5, numbers(uint32(5), uint32(1024), uint32(1))), structured(2, 1, 5, numbers(uint32(5), uint32(3072), uint32(1)))}, []Extent{{0, 4096, 1}}, ""},
		"more than overrun": {[]message{structured(1, 1, 5, numbers(uint32(5), uint32(8192), uint32(1), uint32(1), uint32(0)))}, nil, "behind the range"},
		"empty extent":      {[]message{structured(1, 1, 5, numbers(uint32(5), uint32(0), uint32(1)))}, nil, "empty extent"},
		"no extent":         {[]message{structured(1, 1, 5, numbers(uint32(5)))}, nil, "block status chunk of 4"},
		"twice":             {[]message{structured(1, 0, 5, numbers(uint32(5), uint32(4096), uint32(1))), structured(1, 1, 5, numbers(uint32(5), uint32(4096), uint32(1)))}, nil, "second block status"},
		"not for us":        {[]message{structured(1, 1, 5, numbers(uint32(6), uint32(4096), uint32(1)))}, nil, "did not answer"},
		"none":              {[]message{structured(1, 1, 0, nil)}, nil, "did not answer"},
		"huge":              {[]message{structured(1, 1, 5, make([]byte, maxStatusPayload+8))[:20]}, nil, "block status chunk"},
		"error":             {[]message{structured(1, 1, 0x8001, numbers(uint32(22), uint16(0)))}, nil, "invalid argument"},
	} {
		t.Run(name, func(t *testing.T) {
			c, server := pipe(t)
			go play(server, test.reply)
			var got []Extent
			err := c.Extents(t.Context(), "a", 0, 4096, func(e Extent) error {
				got = append(got, e)
				return nil
			})
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("error is %v, want %q", err, test.err)
				}
				return
			}
			if err != nil || len(got) != len(test.want) {
				t.Fatalf("got %v, %v, want %v", got, err, test.want)
			}
			for i := range got {
				if got[i] != test.want[i] {
					t.Errorf("extent %d is %v, want %v", i, got[i], test.want[i])
				}
			}
		})
	}
}

// A call may be cancelled while its data comes in: the buffer is let go of,
// and the stream stays in step.
func TestCancelInTheMiddleOfAChunk(t *testing.T) {
	c, server := pipe(t)
	ctx, cancel := context.WithCancel(t.Context())
	reply := structured(1, 1, 1, append(numbers(uint64(0)), make([]byte, 4096)...))
	result := make(chan error)
	buf := make([]byte, 4096)
	go func() { result <- c.ReadAt(ctx, buf, 0) }()
	awaitRequest(server)
	if _, err := server.Write(reply[:1000]); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
	for i := range buf { // the race detector sees a late write
		buf[i] = 1
	}
	go func() {
		_, _ = server.Write(reply[1000:])
		awaitRequest(server)
		_, _ = server.Write(structured(2, 1, 1, data(8, "abcd")))
	}()
	got := make([]byte, 4)
	if err := c.ReadAt(t.Context(), got, 8); err != nil || string(got) != "abcd" {
		t.Errorf("next read gives %q, %v", got, err)
	}
}

func FuzzReply(f *testing.F) {
	f.Add([]byte(structured(1, 1, 1, data(100, "abcdefgh"))), []byte(structured(2, 1, 5, numbers(uint32(5), uint32(4096), uint32(1)))))
	f.Add([]byte(structured(1, 1, 2, numbers(uint64(100), uint32(8)))), []byte(structured(2, 1, 0x8001, numbers(uint32(5), uint16(0)))))
	f.Add([]byte(numbers(uint32(magicSimple), uint32(5), uint64(1))), []byte{})
	f.Fuzz(func(t *testing.T, first, second []byte) {
		c, server := pipe(t)
		go func() { _, _ = io.Copy(io.Discard, server) }()
		read := newRequest(commandRead, 100, 8)
		read.buf = make([]byte, 8)
		status := newRequest(commandBlockStatus, 0, 4096)
		status.context = 5
		for _, r := range []*request{read, status} {
			if err := c.start(t.Context(), r); err != nil {
				t.Fatal(err)
			}
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			_, _ = server.Write(first)
			_, _ = server.Write(second)
			_ = server.Close()
		})
		if err := c.wait(t.Context(), read); err == nil && !read.covered.complete(8) {
			t.Error("a read succeeded without all of its data")
		}
		if err := c.wait(t.Context(), status); err == nil && status.answered {
			at := uint64(0)
			for _, e := range status.extents {
				if e.Offset != at || e.Length == 0 || at >= 4096 {
					t.Errorf("extent %v at %d", e, at)
				}
				at += e.Length
			}
		}
		_ = c.Close()
		wg.Wait()
	})
}

func FuzzNegotiate(f *testing.F) {
	reply := func(option, kind uint32, payload []byte) []byte {
		return append(numbers(uint64(magicOptReply), option, kind, uint32(len(payload))), payload...)
	}
	good := numbers(uint64(magicServer), uint64(magicOption), uint16(3))
	good = append(good, reply(optStructuredReply, replyAck, nil)...)
	good = append(good, reply(optSetMetaContext, replyMetaContext, append(numbers(uint32(5)), "a"...))...)
	good = append(good, reply(optSetMetaContext, replyAck, nil)...)
	good = append(good, reply(optGo, replyInfo, numbers(uint16(0), uint64(4096), uint16(1)))...)
	good = append(good, reply(optGo, replyInfo, numbers(uint16(3), uint32(1), uint32(4096), uint32(65536)))...)
	good = append(good, reply(optGo, replyAck, nil)...)
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := negotiate(strings.NewReader(string(b)), io.Discard, Options{Contexts: []string{"a"}})
		if err == nil && (e.minimum == 0 || e.maximum == 0 || e.maximum%e.minimum != 0 || len(e.contexts) != 1) {
			t.Errorf("accepted %+v", e)
		}
	})
}
