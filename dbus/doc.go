// Package dbus is the contract of virtbackup's D-Bus API, org.virtbackup1:
// the introspection XML of every interface (the source of truth, in
// interfaces/), the names, errors, options and property records that both
// sides share, and a typed client.
//
// Signals carry names and never values: a bus gives them to whoever listens,
// and polkit is not asked about a listener. PropertiesChanged therefore only
// invalidates, and InterfacesAdded names interfaces without their properties;
// reading is authorized.
package dbus

//go:generate go test . -run ^TestReferenceIsFresh$ -update
