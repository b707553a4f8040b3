// Package journal makes the daemon's logger: structured entries for journald,
// or text lines for what else stderr may be.
//
// Attributes become fields that start with VIRTBACKUP_, so that
// "journalctl VIRTBACKUP_DOMAIN=…" finds all that was done about one domain.
// Entries that programs wait for have a Message.
package journal

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"sync"

	"github.com/coreos/go-systemd/v22/journal"
)

// Keys of attributes that people search for.
const (
	Domain     = "domain" // UUID
	DomainName = "domain_name"
	Job        = "job"
	Backup     = "backup"
	Repository = "repository"
	Schedule   = "schedule"
	Error      = "error" // is appended to the message too
)

const (
	fieldPrefix  = "VIRTBACKUP_"
	messageField = "MESSAGE_ID"
)

// NewHandler returns a handler for entries at the given level or above: to the
// journal when stderr is connected to it, else as text lines to stderr that
// start with a priority as systemd has it (sd-daemon(3)).
func NewHandler(stderr io.Writer, level slog.Leveler) slog.Handler {
	if connected, err := journal.StderrIsJournalStream(); err == nil && connected && journal.Enabled() {
		return &handler{level: level, send: journal.Send}
	}
	return newTextHandler(stderr, level)
}

// handler sends entries with fields to journald.
type handler struct {
	level  slog.Leveler
	send   func(message string, p journal.Priority, fields map[string]string) error
	fields []field // of WithAttrs
	group  string  // of WithGroup: what field names start with
}

type field struct{ name, value string }

func (h *handler) Enabled(_ context.Context, level slog.Level) bool { return level >= h.level.Level() }

func (h *handler) Handle(_ context.Context, r slog.Record) error {
	fields := h.fields[:len(h.fields):len(h.fields)]
	r.Attrs(func(a slog.Attr) bool {
		fields = appendFields(fields, h.group, a)
		return true
	})
	message, all := r.Message, make(map[string]string, len(fields))
	for _, f := range fields {
		all[f.name] = f.value
		if f.name == fieldPrefix+"ERROR" { // journalctl shows nothing but the message
			message += ": " + f.value
		}
	}
	return h.send(message, priority(r.Level), all)
}

func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	with.fields = h.fields[:len(h.fields):len(h.fields)]
	for _, a := range attrs {
		with.fields = appendFields(with.fields, h.group, a)
	}
	return &with
}

func (h *handler) WithGroup(name string) slog.Handler {
	with := *h
	if name != "" {
		with.group += name + "_"
	}
	return &with
}

func appendFields(fields []field, group string, a slog.Attr) []field {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		if a.Key != "" {
			group += a.Key + "_"
		}
		for _, one := range v.Group() {
			fields = appendFields(fields, group, one)
		}
		return fields
	}
	if m, ok := v.Any().(Message); ok {
		return append(fields, field{messageField, string(m)})
	}
	if a.Key == "" {
		return fields
	}
	return append(fields, field{fieldName(group + a.Key), v.String()})
}

// fieldName makes a name that journald takes: A-Z, 0-9 and _, at most 64 letters.
func fieldName(key string) string {
	name := fieldPrefix + strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		}
		return '_'
	}, key)
	return name[:min(len(name), 64)]
}

func priority(l slog.Level) journal.Priority {
	switch {
	case l >= slog.LevelError:
		return journal.PriErr
	case l >= slog.LevelWarn:
		return journal.PriWarning
	case l >= slog.LevelInfo:
		return journal.PriInfo
	}
	return journal.PriDebug
}

// textHandler writes what slog's TextHandler makes of an entry, after its priority.
type textHandler struct {
	mu   *sync.Mutex // guards the following two, which all handlers made of one share
	line *bytes.Buffer
	out  io.Writer
	slog.Handler
}

func newTextHandler(out io.Writer, level slog.Leveler) slog.Handler {
	line := &bytes.Buffer{}
	text := slog.NewTextHandler(line, &slog.HandlerOptions{Level: level, ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
			return slog.Attr{} // whoever reads stderr knows both
		}
		if _, ok := a.Value.Any().(Message); ok {
			return slog.Attr{} // for programs
		}
		return a
	}})
	return &textHandler{mu: &sync.Mutex{}, line: line, out: out, Handler: text}
}

func (h *textHandler) Handle(ctx context.Context, r slog.Record) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.line.Reset()
	h.line.WriteString("<" + strconv.Itoa(int(priority(r.Level))) + ">")
	if err := h.Handler.Handle(ctx, r); err != nil {
		return err
	}
	_, err := h.out.Write(h.line.Bytes())
	return err
}

func (h *textHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &textHandler{mu: h.mu, line: h.line, out: h.out, Handler: h.Handler.WithAttrs(attrs)}
}

func (h *textHandler) WithGroup(name string) slog.Handler {
	return &textHandler{mu: h.mu, line: h.line, out: h.out, Handler: h.Handler.WithGroup(name)}
}
