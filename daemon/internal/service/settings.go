package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"

	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/dbus"
)

// effective are settings as they come out of defaults, an offering, what a
// domain has in place of them, and what a call says.
type effective struct {
	catalog.Settings
	catalog.Retention
	catalog.Validation
}

// defaultChainSize is CloudStack's.
const defaultChainSize = 8

// defaultSettings are those of an offering that says nothing.
func defaultSettings() catalog.Settings {
	return catalog.Settings{Mode: chain.ModeIncremental, Compression: string(dbus.CompressionNone), CompressionTime: string(dbus.CompressionInline),
		Quiesce: string(dbus.QuiesceNone), QuiescePolicy: string(dbus.QuiesceRequire), Tracking: chain.CBT, Fallback: chain.FallbackDigest,
		ChainSize: defaultChainSize}
}

// set takes over what is given.
func set[T any](to *T, given *T) {
	if given != nil {
		*to = *given
	}
}

// setAs takes over what is given as another type.
func setAs[T ~string, G ~string](to *T, given *G) {
	if given != nil {
		*to = T(*given)
	}
}

func setNumber(to *int, given *uint32) {
	if given != nil {
		*to = int(*given)
	}
}

// apply applies what is given, and checks that all fits.
func (e *effective) apply(o dbus.Overrides) error {
	var err error
	if e.Settings, err = override(e.Settings, o.Settings); err != nil {
		return err
	}
	for _, n := range []struct {
		to    *int
		given *uint32
	}{
		{&e.Last, o.KeepLast}, {&e.Hourly, o.KeepHourly}, {&e.Daily, o.KeepDaily},
		{&e.Weekly, o.KeepWeekly}, {&e.Monthly, o.KeepMonthly}, {&e.Yearly, o.KeepYearly},
	} {
		if n.given != nil && *n.given > mostKept {
			return dbus.Errorf(dbus.ErrInvalidArgument, "%d backups to keep are too many: at most %d", *n.given, mostKept)
		}
		setNumber(n.to, n.given)
	}
	set(&e.Validate, o.Validate)
	set(&e.Steps, o.ValidationSteps)
	for _, step := range e.Steps {
		if !slices.Contains(validationSteps(), step) {
			return dbus.Errorf(dbus.ErrInvalidArgument, "there is no validation step %q: there are %v", step, validationSteps())
		}
	}
	return nil
}

const mostKept = 100_000

// validationSteps are those of CloudStack's KBOSS.
func validationSteps() []string { return []string{"wait_for_boot", "execute_command", "screenshot"} }

// given is all of it as options.
func (e effective) given() dbus.Overrides {
	number := func(n int) *uint32 { return new(uint32(n)) }
	return dbus.Overrides{
		Settings: dbus.Settings{
			Mode: new(dbus.Mode(e.Mode)), Compression: new(dbus.Compression(e.Compression)),
			CompressionTime: new(dbus.CompressionTime(e.CompressionTime)), CompressionLevel: number(e.Level), Threads: number(e.Threads),
			ChainSize: number(e.ChainSize), Quiesce: new(dbus.Quiesce(e.Quiesce)), QuiescePolicy: new(dbus.QuiescePolicy(e.QuiescePolicy)),
			Tracking: new(dbus.Tracking(e.Tracking)), Fallback: new(dbus.Fallback(e.Fallback)),
			IncludeDisks: &e.Include, ExcludeDisks: &e.Exclude, VolatileDisks: &e.Volatile,
		},
		Retention: dbus.Retention{
			KeepLast: number(e.Last), KeepHourly: number(e.Hourly), KeepDaily: number(e.Daily),
			KeepWeekly: number(e.Weekly), KeepMonthly: number(e.Monthly), KeepYearly: number(e.Yearly),
		},
		Validation: dbus.Validation{Validate: &e.Validate, ValidationSteps: &e.Steps},
	}
}

// effectiveOf returns what is in force for a domain with an offering; nil for none.
func effectiveOf(o *catalog.Offering, domain catalog.Domain) (effective, error) {
	e := effective{Settings: defaultSettings()}
	if o != nil {
		e = effective{o.Settings, o.Retention, o.Validation}
	}
	own, err := overridesOf(domain)
	if err != nil {
		return e, err
	}
	return e, e.apply(own)
}

func overridesOf(d catalog.Domain) (o dbus.Overrides, err error) {
	if d.Overrides != nil {
		if err := json.Unmarshal(d.Overrides, &o); err != nil {
			return o, fmt.Errorf("cannot read the settings of domain %q: %w", d.Name, err)
		}
	}
	return o, nil
}

// assigned returns a domain as it is known, and its offering; nil for none.
func (s *Service) assigned(ctx context.Context, uuid string) (catalog.Domain, *catalog.Offering, error) {
	d, err := s.Catalog.Domain(ctx, uuid)
	if errors.Is(err, catalog.ErrNotFound) {
		return catalog.Domain{UUID: uuid}, nil, nil
	}
	if err != nil || d.Offering == "" {
		return d, nil, err
	}
	o, err := s.Catalog.Offering(ctx, d.Offering)
	return d, &o, err
}

// EffectiveRetention returns which backups of a domain stay.
func (s *Service) EffectiveRetention(ctx context.Context, uuid string) (catalog.Retention, error) {
	d, o, err := s.assigned(ctx, uuid)
	if err != nil {
		return catalog.Retention{}, err
	}
	e, err := effectiveOf(o, d)
	return e.Retention, err
}

// DomainSettings returns what is in force for a domain, and from where.
func (s *Service) DomainSettings(ctx context.Context, uuid string) ([]dbus.EffectiveSetting, error) {
	d, o, err := s.assigned(ctx, uuid)
	if err != nil {
		return nil, failure.Named(err)
	}
	e, err := effectiveOf(o, d)
	if err != nil {
		return nil, err
	}
	own, err := overridesOf(d)
	if err != nil {
		return nil, err
	}
	ofDomain, values := dbus.OptionTexts(own), dbus.OptionTexts(e.given())
	var all []dbus.EffectiveSetting
	for _, key := range slices.Sorted(maps.Keys(values)) {
		one := dbus.EffectiveSetting{Key: key, Value: values[key], Source: "default"}
		if o != nil {
			one.Source = "offering"
		}
		if _, given := ofDomain[key]; given {
			one.Source = "domain"
		}
		all = append(all, one)
	}
	return all, nil
}

// SetOverrides sets and unsets what a domain has in place of its offering's settings.
func (s *Service) SetOverrides(ctx context.Context, _ bus.Caller, uuid string, given dbus.Overrides, unset []string) error {
	d, o, err := s.assigned(ctx, uuid)
	if err != nil {
		return failure.Named(err)
	}
	if d.Name == "" {
		live, err := s.lookup(ctx, uuid)
		if err != nil {
			return failure.Named(err)
		}
		d.UUID, d.Name = live.UUID, live.Name
	}
	own, err := overridesOf(d)
	if err != nil {
		return err
	}
	if err := dbus.UnsetOptions(&own, unset); err != nil {
		return err
	}
	dbus.MergeOptions(&own, given)
	if d.Overrides, err = json.Marshal(own); err != nil {
		return err
	}
	if _, err := effectiveOf(o, d); err != nil {
		return err
	}
	if err := s.Catalog.OverrideDomain(ctx, d.UUID, d.Name, d.Overrides); err != nil {
		return failure.Named(err)
	}
	s.notifier.Changed(dbus.Ref{Kind: dbus.KindDomain, ID: d.UUID})
	return nil
}

// override applies what is given to settings, and checks that they fit.
func override(to catalog.Settings, o dbus.Settings) (catalog.Settings, error) {
	setAs(&to.Mode, o.Mode)
	if o.Compression != nil && to.Compression != string(*o.Compression) {
		to.Level = 0 // a level means something else to each compression
	}
	setAs(&to.Compression, o.Compression)
	setAs(&to.CompressionTime, o.CompressionTime)
	setNumber(&to.Level, o.CompressionLevel)
	setNumber(&to.Threads, o.Threads)
	setNumber(&to.ChainSize, o.ChainSize)
	setAs(&to.Quiesce, o.Quiesce)
	setAs(&to.QuiescePolicy, o.QuiescePolicy)
	setAs(&to.Tracking, o.Tracking)
	setAs(&to.Fallback, o.Fallback)
	set(&to.Include, o.IncludeDisks)
	set(&to.Exclude, o.ExcludeDisks)
	set(&to.Volatile, o.VolatileDisks)
	return to, fit(to)
}

// targetPattern is what a manifest takes as a disk's target.
var targetPattern = regexp.MustCompile(`^[a-z][a-z0-9]{0,31}$`)

func fit(c catalog.Settings) error {
	highest := map[dbus.Compression]int{dbus.CompressionZlib: 9, dbus.CompressionZstd: 22}[dbus.Compression(c.Compression)]
	if c.Level > highest {
		return dbus.Errorf(dbus.ErrInvalidArgument, "compression_level %d is too high for compression %s: at most %d", c.Level, c.Compression, highest)
	}
	if c.Threads > 256 {
		return dbus.Errorf(dbus.ErrInvalidArgument, "threads %d is too high: at most 256", c.Threads)
	}
	if c.ChainSize > 10_000 {
		return dbus.Errorf(dbus.ErrInvalidArgument, "chain_size %d is too high: at most 10000", c.ChainSize)
	}
	for _, target := range slices.Concat(c.Include, c.Exclude) {
		if !targetPattern.MatchString(target) {
			return dbus.Errorf(dbus.ErrInvalidArgument, "%q is not the target of a disk, such as vda", target)
		}
	}
	for _, target := range c.Include {
		if slices.Contains(c.Exclude, target) {
			return dbus.Errorf(dbus.ErrInvalidArgument, "disk %s is included and excluded", target)
		}
	}
	return nil
}
