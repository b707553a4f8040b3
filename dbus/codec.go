package dbus

import (
	"fmt"
	"math"
	"reflect"
	"slices"
	"sort"
	"strings"
	"time"
	"unicode/utf8"

	godbus "github.com/godbus/dbus/v5"
)

// A struct stands for a{sv} when its fields are tagged `dbus:"key"`. Fields
// are strings, booleans, uint32, uint64, float64, []string, time.Time (a t: µs
// since the epoch, 0 for the zero time), slices of such structs (aa{sv}), or
// pointers to these for what may be absent. Embedded structs are part of
// theirs.

// enum is a string type of which the values are known.
type enum interface{ Values() []string }

type field struct {
	key   string
	value reflect.Value
}

// fields returns the tagged fields of the struct v, in their order.
func fields(v reflect.Value) []field {
	var out []field
	for i := range v.NumField() {
		sf := v.Type().Field(i)
		if sf.Anonymous {
			out = append(out, fields(v.Field(i))...)
		} else if key := sf.Tag.Get("dbus"); key != "" {
			out = append(out, field{key, v.Field(i)})
		}
	}
	return out
}

// EncodeRecord returns all fields of a record. It has no pointers.
func EncodeRecord(record any) map[string]godbus.Variant {
	out := make(map[string]godbus.Variant)
	for _, f := range fields(reflect.Indirect(reflect.ValueOf(record))) {
		out[f.key] = godbus.MakeVariant(sendable(encodeValue(f.value)))
	}
	return out
}

// EncodeRecords returns all fields of each record of a list.
func EncodeRecords[R any](records []R) []map[string]godbus.Variant {
	out := make([]map[string]godbus.Variant, len(records))
	for i, r := range records {
		out[i] = EncodeRecord(r)
	}
	return out
}

// EncodeOptions returns the options that are given: empty fields are left out,
// but what a pointer points to is given even where it is empty.
func EncodeOptions(o any) map[string]godbus.Variant {
	out := make(map[string]godbus.Variant)
	for _, f := range fields(reflect.ValueOf(o)) {
		if !f.value.IsZero() {
			out[f.key] = godbus.MakeVariant(encodeValue(reflect.Indirect(f.value)))
		}
	}
	return out
}

func encodeValue(v reflect.Value) any {
	switch x := v.Interface().(type) {
	case time.Time:
		return Micros(x)
	case []string:
		return append([]string{}, x...)
	}
	switch v.Kind() {
	case reflect.String:
		return v.String()
	case reflect.Slice:
		list := make([]map[string]godbus.Variant, v.Len())
		for i := range list {
			list[i] = EncodeRecord(v.Index(i).Interface())
		}
		return list
	default:
		return v.Interface()
	}
}

// sendable makes texts such as the bus takes; other values stay.
func sendable(value any) any {
	switch x := value.(type) {
	case string:
		return text(x)
	case []string: // made by encodeValue, and ours
		for i := range x {
			x[i] = text(x[i])
		}
	}
	return value
}

// text is a string in UTF-8 without a zero byte. Names of files, which details
// and errors may hold, are any bytes.
func text(s string) string {
	const unknown = string(utf8.RuneError)
	return strings.ReplaceAll(strings.ToValidUTF8(s, unknown), "\x00", unknown)
}

// DecodeOptions reads options into the struct that o points to. It is strict:
// a key that o does not have, a value of another type, or one that its type
// does not list is ErrInvalidArgument, and is named.
func DecodeOptions(m map[string]godbus.Variant, o any) error {
	known := fields(reflect.ValueOf(o).Elem())
	for _, key := range sortedKeys(m) {
		i := slices.IndexFunc(known, func(f field) bool { return f.key == key })
		if i < 0 {
			return Errorf(ErrInvalidArgument, "unknown option %q", key)
		}
		value := known[i].value
		if value.Kind() == reflect.Pointer {
			value.Set(reflect.New(value.Type().Elem()))
			value = value.Elem()
		}
		if err := decodeValue(m[key], value, true); err != nil {
			return Errorf(ErrInvalidArgument, "option %q: %v", key, err)
		}
	}
	return nil
}

// SetOption sets one option of the struct that o points to, to a value as
// configuration files have them: a string, a truth, a whole number or a list.
// It is as strict as DecodeOptions.
func SetOption(o any, key string, value any) error {
	for _, f := range fields(reflect.ValueOf(o).Elem()) {
		if f.key != key {
			continue
		}
		plain, err := plainAs(value, signature(f.value.Type()))
		if err == nil {
			return DecodeOptions(map[string]godbus.Variant{key: godbus.MakeVariant(plain)}, o)
		}
		return Errorf(ErrInvalidArgument, "option %q: %v", key, err)
	}
	return Errorf(ErrInvalidArgument, "unknown option %q", key)
}

// plainAs returns a value as the D-Bus type asks for it.
func plainAs(value any, want string) (any, error) {
	switch x := value.(type) {
	case string, bool:
		return x, nil // whether it is what is wanted, the decoder sees
	case int64:
		if want != "u" || x < 0 || x > math.MaxUint32 {
			return nil, fmt.Errorf("%d is not expected", x)
		}
		return uint32(x), nil
	case []any:
		list := make([]string, len(x))
		for i, one := range x {
			text, ok := one.(string)
			if !ok {
				return nil, fmt.Errorf("%v is not a list of strings", x)
			}
			list[i] = text
		}
		return list, nil
	}
	return nil, fmt.Errorf("%v is not expected", value)
}

// MergeOptions sets the options of the struct that into points to that are
// given in one of the same type; their fields are pointers.
func MergeOptions[O any](into *O, given O) {
	to := fields(reflect.ValueOf(into).Elem())
	for i, f := range fields(reflect.ValueOf(given)) {
		if !f.value.IsZero() {
			to[i].value.Set(f.value)
		}
	}
}

// UnsetOptions takes options away by their keys. ErrInvalidArgument names one
// that there is not.
func UnsetOptions[O any](from *O, keys []string) error {
	known := fields(reflect.ValueOf(from).Elem())
	for _, key := range keys {
		i := slices.IndexFunc(known, func(f field) bool { return f.key == key })
		if i < 0 {
			return Errorf(ErrInvalidArgument, "unknown option %q", key)
		}
		known[i].value.SetZero()
	}
	return nil
}

// OptionKeys returns the keys of all options.
func OptionKeys(o any) []string {
	var keys []string
	for _, f := range fields(reflect.ValueOf(o)) {
		keys = append(keys, f.key)
	}
	return keys
}

// OptionTexts returns the options that are given as texts, by their keys.
func OptionTexts(o any) map[string]string {
	out := make(map[string]string)
	for key, variant := range EncodeOptions(o) {
		switch x := variant.Value().(type) {
		case []string:
			out[key] = strings.Join(x, ", ")
		default:
			out[key] = fmt.Sprint(x)
		}
	}
	return out
}

// DecodeRecord reads what a daemon said into the struct that r points to. Keys
// that r does not have are left alone: a newer daemon may say more.
func DecodeRecord(m map[string]godbus.Variant, r any) error {
	return decodeStruct(m, reflect.ValueOf(r).Elem(), false)
}

func decodeStruct(m map[string]godbus.Variant, v reflect.Value, strict bool) error {
	for _, f := range fields(v) {
		variant, ok := m[f.key]
		if !ok {
			continue
		}
		if err := decodeValue(variant, f.value, strict); err != nil {
			return fmt.Errorf("%q: %w", f.key, err)
		}
	}
	return nil
}

func decodeValue(variant godbus.Variant, dest reflect.Value, strict bool) error {
	want := signature(dest.Type())
	if got := variant.Signature().String(); got != want {
		return fmt.Errorf("its type is %q, and %q is expected", got, want)
	}
	switch x := variant.Value().(type) {
	case uint64:
		if dest.Type() == reflect.TypeFor[time.Time]() {
			return decodeTime(x, dest)
		}
		dest.SetUint(x)
	case string:
		dest.SetString(x)
		if e, ok := dest.Interface().(enum); strict && ok && !slices.Contains(e.Values(), x) {
			return fmt.Errorf("%q is none of %s", x, strings.Join(e.Values(), ", "))
		}
	case []map[string]godbus.Variant:
		dest.Set(reflect.MakeSlice(dest.Type(), len(x), len(x)))
		for i, m := range x {
			if err := decodeStruct(m, dest.Index(i), strict); err != nil {
				return fmt.Errorf("entry %d: %w", i, err)
			}
		}
	default:
		dest.Set(reflect.ValueOf(x).Convert(dest.Type()))
	}
	return nil
}

func decodeTime(micros uint64, dest reflect.Value) error {
	if micros > math.MaxInt64 {
		return fmt.Errorf("%d µs is no time", micros)
	}
	dest.Set(reflect.ValueOf(Time(micros)))
	return nil
}

// signature returns the D-Bus type of a field.
func signature(t reflect.Type) string {
	switch {
	case t.Kind() == reflect.Pointer:
		return signature(t.Elem())
	case t == reflect.TypeFor[time.Time]():
		return "t"
	case t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Struct:
		return "aa{sv}"
	}
	return godbus.SignatureOfType(t).String()
}

// Micros returns t in µs since the epoch; 0 for the zero time.
func Micros(t time.Time) uint64 {
	if t.IsZero() || t.UnixMicro() < 0 {
		return 0
	}
	return uint64(t.UnixMicro())
}

// Time is the inverse of Micros.
func Time(micros uint64) time.Time {
	if micros == 0 {
		return time.Time{}
	}
	return time.UnixMicro(int64(micros))
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}
