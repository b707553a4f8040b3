package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"strings"
	"time"
	"unicode"
)

// jsonMode is the value of --json.
type jsonMode string

const (
	jsonOff    jsonMode = "off"
	jsonShort  jsonMode = "short"
	jsonPretty jsonMode = "pretty"
)

// Values returns what it can be.
func (jsonMode) Values() []string { return []string{"pretty", "short", "off"} }

// object is a JSON object that keeps the order of its members.
type object []member

type member struct {
	key   string
	value any
}

// MarshalJSON writes the members in their order.
func (o object) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, "%q:", m.key)
		// json.Marshal would escape what is special in HTML.
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(false)
		if err := e.Encode(m.value); err != nil {
			return nil, err
		}
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// writeJSON writes a value as one document. Records of package dbus become
// objects with the names of their properties in snake case; times are RFC 3339,
// and null where there is none.
func writeJSON(w io.Writer, mode jsonMode, value any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	if mode == jsonPretty {
		e.SetIndent("", "  ")
	}
	return e.Encode(jsonValue(reflect.ValueOf(value)))
}

func jsonValue(v reflect.Value) any {
	switch x := v.Interface().(type) {
	case time.Time:
		if x.IsZero() {
			return nil
		}
		return x.UTC().Format("2006-01-02T15:04:05.000000Z07:00")
	case object:
		all := make(object, len(x))
		for i, m := range x {
			all[i] = member{m.key, jsonValue(reflect.ValueOf(m.value))}
		}
		return all
	}
	switch v.Kind() {
	case reflect.Slice:
		list := make([]any, v.Len())
		for i := range list {
			list[i] = jsonValue(v.Index(i))
		}
		return list
	case reflect.Struct:
		return jsonValue(reflect.ValueOf(members(v.Interface())))
	}
	return v.Interface()
}

// members returns the properties of a record.
func members(record any) object {
	v := reflect.ValueOf(record)
	var all object
	for i := range v.NumField() {
		if key := v.Type().Field(i).Tag.Get("dbus"); key != "" {
			all = append(all, member{snake(key), v.Field(i).Interface()})
		}
	}
	return all
}

// snake turns the name of a property into that of a JSON member: DomainUuid
// into domain_uuid.
func snake(name string) string {
	var b strings.Builder
	for i, r := range name {
		if unicode.IsUpper(r) && i > 0 {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}
