package service

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"time"

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
	chain.Retention
	catalog.Rights // but Users, which are the offering's alone
	catalog.Validation
}

func effectiveIn(o catalog.Offering) effective {
	return effective{o.Settings, o.Retention, o.Rights, o.Validation}
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

func setSeconds(to *time.Duration, given *uint32) {
	if given != nil {
		*to = time.Duration(*given) * time.Second
	}
}

// apply applies what is given; fit tells whether it fits together.
func (e *effective) apply(o dbus.Overrides) {
	e.Settings = override(e.Settings, o.Settings)
	setNumber(&e.Last, o.KeepLast)
	setNumber(&e.Hourly, o.KeepHourly)
	setNumber(&e.Daily, o.KeepDaily)
	setNumber(&e.Weekly, o.KeepWeekly)
	setNumber(&e.Monthly, o.KeepMonthly)
	setNumber(&e.Yearly, o.KeepYearly)
	set(&e.Backups, o.AllowUserBackups)
	set(&e.Schedules, o.AllowUserSchedules)
	set(&e.QuickRestore, o.AllowQuickRestore)
	set(&e.FileExtraction, o.AllowFileExtraction)
	set(&e.Validate, o.Validate)
	set(&e.Steps, o.ValidationSteps)
	setSeconds(&e.BootTimeout, o.ValidationBootTimeout)
	set(&e.Command, o.ValidationCommand)
	set(&e.Arguments, o.ValidationArguments)
	set(&e.Expected, o.ValidationExpected)
	setSeconds(&e.CommandTimeout, o.ValidationCommandTimeout)
	setSeconds(&e.ScreenshotWait, o.ValidationScreenshotWait)
	set(&e.Ports, o.ValidationPorts)
}

func (e effective) fit() error {
	for _, kept := range []int{e.Last, e.Hourly, e.Daily, e.Weekly, e.Monthly, e.Yearly} {
		if kept > mostKept {
			return dbus.Errorf(dbus.ErrInvalidArgument, "%d backups to keep are too many: at most %d", kept, mostKept)
		}
	}
	return cmp.Or(fitValidation(e.Validation), fit(e.Settings))
}

const mostKept = 100_000

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
		Rights: dbus.Rights{
			AllowUserBackups: &e.Backups, AllowUserSchedules: &e.Schedules,
			AllowQuickRestore: &e.QuickRestore, AllowFileExtraction: &e.FileExtraction,
		},
		Validation: dbus.Validation{
			Validate: &e.Validate, ValidationSteps: &e.Steps, ValidationBootTimeout: new(seconds(e.BootTimeout)),
			ValidationCommand: &e.Command, ValidationArguments: &e.Arguments, ValidationExpected: &e.Expected,
			ValidationCommandTimeout: new(seconds(e.CommandTimeout)), ValidationScreenshotWait: new(seconds(e.ScreenshotWait)), ValidationPorts: &e.Ports,
		},
	}
}

// effectiveOf returns what is in force for a domain with an offering; nil for
// none. It bends what does not fit: an offering may have come to say something
// else since the domain got settings of its own.
func effectiveOf(o *catalog.Offering, domain catalog.Domain) (effective, error) {
	e, err := layered(o, domain)
	e.Level = min(e.Level, highestLevel(e.Compression))
	return e, err
}

// layered is the same as it was said.
func layered(o *catalog.Offering, domain catalog.Domain) (effective, error) {
	base := defaultOffering("")
	if o != nil {
		base = *o
	}
	e := effectiveIn(base)
	own, err := overridesOf(domain)
	e.apply(own)
	return e, err
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
func (s *Service) EffectiveRetention(ctx context.Context, uuid string) (chain.Retention, error) {
	d, o, err := s.assigned(ctx, uuid)
	if err != nil {
		return chain.Retention{}, err
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
	defaults := dbus.OptionTexts(effectiveIn(defaultOffering("")).given())
	var all []dbus.EffectiveSetting
	for _, key := range slices.Sorted(maps.Keys(values)) {
		one := dbus.EffectiveSetting{Key: key, Value: values[key], Source: "default"}
		if _, given := ofDomain[key]; given {
			one.Source = "domain"
		} else if one.Value != defaults[key] {
			one.Source = "offering"
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
	d.Overrides = nil
	if own != (dbus.Overrides{}) {
		if d.Overrides, err = json.Marshal(own); err != nil {
			return err
		}
	}
	e, err := layered(o, d)
	if err == nil {
		err = e.fit()
	}
	if err != nil {
		return err
	}
	if err := s.Catalog.OverrideDomain(ctx, d.UUID, d.Name, d.Overrides); err != nil {
		return failure.Named(err)
	}
	s.notifier.Changed(dbus.Ref{Kind: dbus.KindDomain, ID: d.UUID})
	return nil
}

// override applies what is given to settings.
func override(to catalog.Settings, o dbus.Settings) catalog.Settings {
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
	return to
}

// targetPattern is what a manifest takes as a disk's target.
var targetPattern = regexp.MustCompile(`^[a-z][a-z0-9]{0,31}$`)

func highestLevel(compression string) int {
	return map[dbus.Compression]int{dbus.CompressionZlib: 9, dbus.CompressionZstd: 22}[dbus.Compression(compression)]
}

func fit(c catalog.Settings) error {
	if highest := highestLevel(c.Compression); c.Level > highest {
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
