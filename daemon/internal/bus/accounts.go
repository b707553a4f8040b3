package bus

import (
	"context"
	"slices"
	"strings"

	"github.com/virtbackup/virtbackup/dbus"
)

func metrics(dbus.Ref, arguments) (request, error) {
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		text, err := s.backend.Metrics(ctx)
		return []any{text}, err
	}
	return request{run: run}, nil
}

// known refuses a word that is not one of its kind. It is for after the call was
// authorized: before, nobody is told what the words are.
func known[W interface {
	~string
	Values() []string
}](w W) error {
	if slices.Contains(w.Values(), string(w)) {
		return nil
	}
	return dbus.Errorf(dbus.ErrInvalidArgument, "%q is none of %s", string(w), strings.Join(w.Values(), ", "))
}

func listUsage(_ dbus.Ref, a arguments) (request, error) {
	by := dbus.UsageBy(a.text(0))
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		if err := known(by); err != nil {
			return nil, err
		}
		usage, err := s.backend.ListUsage(ctx, by)
		return []any{dbus.EncodeRecords(usage)}, err
	}
	return request{run: run}, nil
}

func listQuotas(dbus.Ref, arguments) (request, error) {
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		quotas, err := s.backend.ListQuotas(ctx)
		return []any{dbus.EncodeRecords(quotas)}, err
	}
	return request{run: run}, nil
}

func setQuota(about dbus.Ref, a arguments) (request, error) {
	kind, name := dbus.QuotaKind(a.text(0)), a.text(1)
	var o dbus.QuotaOptions
	run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		err := known(kind)
		if err == nil {
			err = s.backend.SetQuota(ctx, c, kind, name, o)
		}
		return nil, s.done(c, "set the quota of "+string(kind)+" "+name, about, err)
	}
	r := request{run: run}
	switch kind {
	case dbus.QuotaDomain:
		r.mentions = []mention{{dbus.KindDomain, name}}
	case dbus.QuotaOffering:
		r.mentions = []mention{{dbus.KindOffering, name}}
	}
	return r, a.options(&o)
}

// removeQuota mentions nothing: what the quota is of may be gone.
func removeQuota(about dbus.Ref, a arguments) (request, error) {
	kind, name := dbus.QuotaKind(a.text(0)), a.text(1)
	run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		err := known(kind)
		if err == nil {
			err = s.backend.RemoveQuota(ctx, c, kind, name)
		}
		return nil, s.done(c, "remove the quota of "+string(kind)+" "+name, about, err)
	}
	return request{run: run}, a.options(&dbus.NoOptions{})
}
