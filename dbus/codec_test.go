package dbus

import (
	"errors"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	godbus "github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"
)

type variants = map[string]godbus.Variant

func TestOptionsRoundTrip(t *testing.T) {
	mode, level, zero := ModeFull, uint32(3), uint32(0)
	policy, tracking, fallback := QuiescePrefer, TrackingSnapshot, FallbackFull
	since := time.UnixMicro(1_700_000_000_123_456)
	for _, want := range []any{
		&BackupOptions{},
		&BackupOptions{Offering: "daily", Full: true, Settings: Settings{Mode: &mode, CompressionLevel: &level, ChainSize: &zero}},
		&UpdateOfferingOptions{OfferingOptions: OfferingOptions{Overrides: Overrides{Settings: Settings{QuiescePolicy: &policy, Tracking: &tracking, Fallback: &fallback}}}},
		&PlanRestoreOptions{InPlace: true, RestoreOptions: RestoreOptions{Disks: []string{"vda"}}},
		&BackupFilter{Domain: "web", Since: &since},
	} {
		got := reflect.New(reflect.TypeOf(want).Elem()).Interface()
		if err := DecodeOptions(EncodeOptions(reflect.ValueOf(want).Elem().Interface()), got); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
}

func TestOptionsAreStrict(t *testing.T) {
	for name, c := range map[string]struct {
		options variants
		says    string
	}{
		"unknown":       {variants{"fulll": godbus.MakeVariant(true)}, `unknown option "fulll"`},
		"property name": {variants{"Full": godbus.MakeVariant(true)}, `unknown option "Full"`},
		"wrong type":    {variants{"full": godbus.MakeVariant("yes")}, `option "full": its type is "s"`},
		"signed":        {variants{"threads": godbus.MakeVariant(int32(4))}, `option "threads": its type is "i"`},
		"not listed":    {variants{"quiesce": godbus.MakeVariant("maybe")}, `"maybe" is none of none, agent, suspend`},
		"not asked for": {variants{"tracking": godbus.MakeVariant("none")}, `"none" is none of cbt, digest, snapshot`},
		"nested":        {variants{"full": godbus.MakeVariant(godbus.MakeVariant(true))}, `its type is "v"`},
	} {
		err := DecodeOptions(c.options, new(BackupOptions))
		if !errors.Is(err, ErrInvalidArgument) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	err := DecodeOptions(variants{"since": godbus.MakeVariant(uint64(math.MaxUint64))}, new(BackupFilter))
	if !errors.Is(err, ErrInvalidArgument) {
		t.Errorf("a time beyond the calendar: %v", err)
	}
}

func TestRecordsRoundTrip(t *testing.T) {
	want := BackupProperties{
		ID: "01JD8Q4M6Z3V5W7X9YABCDEFGH", Kind: KindIncremental, Isolated: true, SizeBytes: math.MaxUint64,
		Created: time.UnixMicro(1_700_000_000_123_456), Causes: []string{"disk attached"},
		Damage: []BackupDamage{{Target: "vda", Offset: 65536, Length: 65536, Image: "01"}},
		Disks:  []BackupDisk{{Target: "vda", Size: 512, Tracking: TrackingCBT}, {Target: "vdb"}},
	}
	encoded := EncodeRecord(want)
	encoded["FromTheFuture"] = godbus.MakeVariant("x")
	var got BackupProperties
	if err := DecodeRecord(encoded, &got); err != nil {
		t.Fatal(err)
	}
	want.Children = []string{}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestToErrorKeepsTheNameAndTheWholeMessage(t *testing.T) {
	inner := Errorf(ErrBusy, "job 1 is at work on it")
	err := ToError(errors.Join(errors.New("cannot back up web"), inner))
	if err.Name != ErrBusy || !strings.Contains(err.Message, "cannot back up web") || !errors.Is(err, ErrBusy) {
		t.Errorf("%+v", err)
	}
	if err := ToError(errors.New("x")); err.Name != ErrFailed {
		t.Errorf("%+v", err)
	}
	if err := ToError(ErrNotFound); err.Name != ErrNotFound {
		t.Errorf("%+v", err)
	}
}

// FuzzOptions decodes options of every type of value. What is accepted must
// come back the same when it is encoded again.
func FuzzOptions(f *testing.F) {
	f.Add("quiesce", "agent", uint64(3), uint8(0))
	f.Add("threads", "", uint64(1<<40), uint8(3))
	f.Add("disks", "vda\x00", uint64(0), uint8(6))
	f.Add("since", "", uint64(math.MaxInt64), uint8(2))
	f.Fuzz(func(t *testing.T, key, text string, number uint64, typ uint8) {
		values := []any{
			text, number%2 == 0, number, uint32(number), int64(number), math.Float64frombits(number),
			[]string{text, key}, []byte(text), variants{key: godbus.MakeVariant(text)},
			godbus.MakeVariant(number), []variants{{key: godbus.MakeVariant(text)}},
		}
		options := variants{key: godbus.MakeVariant(values[int(typ)%len(values)])}
		for _, o := range []any{
			new(BackupOptions), new(PlanRestoreOptions), new(BackupFilter), new(JobFilter), new(UpdateOfferingOptions),
			new(CreateRepositoryOptions), new(DeleteBackupOptions), new(NoOptions),
		} {
			err := DecodeOptions(options, o)
			if err != nil {
				if !errors.Is(err, ErrInvalidArgument) {
					t.Fatalf("%T refuses %v with %v", o, options, err)
				}
				continue
			}
			again := reflect.New(reflect.TypeOf(o).Elem())
			if err := DecodeOptions(EncodeOptions(reflect.ValueOf(o).Elem().Interface()), again.Interface()); err != nil {
				t.Fatalf("%T accepts %v, and not what it made of it: %v", o, options, err)
			}
			if diff := cmp.Diff(o, again.Interface()); diff != "" {
				t.Fatal(diff)
			}
		}
	})
}
