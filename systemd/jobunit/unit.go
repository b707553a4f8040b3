package jobunit

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// Slice holds all workers, so that together they are weighed against the guests (virtbackup.slice).
const Slice = "virtbackup.slice"

// startLimit is how long systemd may take to build a worker's sandbox and execute it. It is long only when one of its
// paths lies on a share that does not answer.
const startLimit = 30 * time.Second

// Limits are the resources of one worker. Zero means: systemd's default. See systemd.resource-control(5).
type Limits struct {
	CPUWeight uint64 // 1 to 10000, 100 is the default of every unit
	CPUQuota  uint64 // percent of one CPU
	IOWeight  uint64 // 1 to 10000
	MemoryMax uint64 // bytes, page cache included
	TasksMax  uint64 // threads and processes
}

// Unit is a worker to be started. Its sandbox shows it only what is named here: Root becomes its /, with the system's
// programs and libraries, /proc, /dev (no devices of hardware) and the paths below, each at its own place. What does not
// exist is left out, for the worker to tell: it knows better what is missing.
//
// ProtectSystem=strict without a root of its own would remount every mount of the host, so that one dead share would keep
// every worker, also those of other repositories, from starting. A mount that is not named here is not touched.
type Unit struct {
	Name        string
	Description string
	Command     []string // absolute path and arguments, taken literally
	Root        string   // an empty directory, for this unit alone
	ReadOnly    []string // absolute paths
	ReadWrite   []string // absolute paths
	Devices     []string // absolute paths of block devices, readable and writable
	// ReadOnlyDevices are absolute paths of block devices, readable.
	ReadOnlyDevices []string
	// Capabilities are those that it keeps, as a mask; 0 for those that workers need.
	Capabilities uint64
	StopAfter    time.Duration
	Limits       Limits
}

// system is what any program needs to run: itself, its libraries, names of users, the time zone.
var system = []string{"/usr", "/lib", "/lib64", "/bin", "/sbin",
	"/etc/ld.so.cache", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/localtime"}

var unitName = regexp.MustCompile(`^[a-zA-Z0-9:_.-]{1,240}\.service$`)

func (u Unit) check() error {
	switch {
	case !unitName.MatchString(u.Name):
		return fmt.Errorf("%q is not the name of a service unit", u.Name)
	case len(u.Command) == 0:
		return errors.New("no command")
	case u.StopAfter <= 0:
		return errors.New("no time to stop in")
	}
	for _, p := range slices.Concat([]string{u.Command[0], u.Root}, u.ReadOnly, u.ReadWrite, u.Devices, u.ReadOnlyDevices) {
		if !filepath.IsAbs(p) || filepath.Clean(p) != p || p == "/" {
			return fmt.Errorf("%q is not a clean absolute path below /", p)
		}
	}
	return nil
}

func (u Unit) properties() []systemd.Property {
	p := []systemd.Property{
		property("Description", u.Description),
		property("Slice", Slice),
		// Workers are stopped before shares and local mounts are unmounted at shutdown.
		property("After", []string{"remote-fs.target", "local-fs.target"}),
		// Started means executed: a missing program or a sandbox that cannot be built is an error of Start.
		property("Type", "exec"),
		// Not ExecStartEx with no-env-expand: systemd 252 writes that into the unit's file under a name that it does not
		// know when it reads the file again, at every daemon-reload. (false: a failure is one.)
		systemd.PropExecStart(literal(u.Command), false),
		// A failed unit stays until Forget, so that it can be told how it ended, also by a daemon that was not there.
		property("CollectMode", "inactive"),
		property("KillMode", "mixed"),
		property("OOMPolicy", "kill"),
		property("TimeoutStartUSec", microseconds(startLimit)),
		property("TimeoutStopUSec", microseconds(u.StopAfter)),
		property("StandardInput", "null"),
		property("UMask", uint32(0o077)),
		property("RootDirectory", u.Root),
		property("MountAPIVFS", true),
		property("BindReadOnlyPaths", binds(slices.Concat(system, []string{u.Command[0]}, u.ReadOnly, u.ReadOnlyDevices))),
		property("BindPaths", binds(slices.Concat(u.ReadWrite, u.Devices))),
		// Also what is between the binds: a worker must not write into its root where it means a path that is missing.
		property("ProtectSystem", "strict"),
		property("ReadWritePaths", within(u.ReadWrite)),
		property("DeviceAllow", slices.Concat(allow(u.Devices, "rw"), allow(u.ReadOnlyDevices, "r"))),
	}
	return slices.Concat(p, u.sandbox(), u.Limits.properties())
}

// sandbox is what no worker needs, whatever its job. RestrictSUIDSGID= is not here: its filter answers ENOSYS to
// openat2(2), with which workers open every path of a repository.
func (u Unit) sandbox() []systemd.Property {
	capabilities := u.Capabilities
	if capabilities == 0 {
		capabilities = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_DAC_READ_SEARCH | 1<<unix.CAP_FOWNER
	}
	return []systemd.Property{
		// Owners and modes of restored files; sources and repositories may belong to anybody.
		property("CapabilityBoundingSet", capabilities),
		property("NoNewPrivileges", true),
		property("PrivateDevices", true),
		// Sources are reached by NBD over unix sockets in the file system; shares are mounted by the host.
		property("PrivateNetwork", true),
		property("RestrictAddressFamilies", filter{Allow: true, Names: []string{"AF_UNIX"}}),
		property("PrivateIPC", true),
		property("ProtectHostname", true),
		property("ProtectClock", true),
		property("ProtectKernelTunables", true),
		property("ProtectKernelModules", true),
		property("ProtectKernelLogs", true),
		property("ProtectControlGroups", true),
		property("RestrictNamespaces", uint64(0)), // mask of the allowed ones
		property("RestrictRealtime", true),
		property("LockPersonality", true),
		property("MemoryDenyWriteExecute", true),
		property("SystemCallArchitectures", []string{"native"}),
		property("SystemCallFilter", filter{Allow: true, Names: []string{"@system-service"}}),
		property("SystemCallErrorNumber", int32(unix.EPERM)),
		// A core would hold data of guests and the key of the manifests.
		property("LimitCORE", uint64(0)),
		property("LimitCORESoft", uint64(0)),
	}
}

func (l Limits) properties() []systemd.Property {
	// CPUQuota is percent: 1 % of one CPU is 10 ms of CPU time per second.
	const quotaUnit = 10_000
	var p []systemd.Property
	for _, limit := range []struct {
		name  string
		value uint64
	}{
		{"CPUWeight", l.CPUWeight},
		{"CPUQuotaPerSecUSec", l.CPUQuota * quotaUnit},
		{"IOWeight", l.IOWeight},
		{"MemoryMax", l.MemoryMax},
		{"TasksMax", l.TasksMax},
	} {
		if limit.value != 0 {
			p = append(p, property(limit.name, limit.value))
		}
	}
	return p
}

// changed is the same for a unit that runs: what has no limit now may have had one.
func (l Limits) changed() []systemd.Property {
	const none = ^uint64(0) // as systemd has it
	for _, value := range []*uint64{&l.CPUWeight, &l.IOWeight, &l.MemoryMax} {
		if *value == 0 {
			*value = none
		}
	}
	p := l.properties()
	if l.CPUQuota == 0 {
		p = append(p, property("CPUQuotaPerSecUSec", none))
	}
	return p
}

// literal keeps systemd from expanding variables in a command's arguments: see "Command lines" in systemd.service(5).
func literal(command []string) []string {
	escaped := slices.Clone(command)
	for i := range escaped[1:] {
		escaped[i+1] = strings.ReplaceAll(escaped[i+1], "$", "$$")
	}
	return escaped
}

// Types of systemd's D-Bus properties, org.freedesktop.systemd1(5).
type (
	bind struct { // a(ssbt)
		Source, Destination string
		IgnoreMissing       bool
		Flags               uint64
	}
	filter struct { // (bas)
		Allow bool
		Names []string
	}
	device struct { // a(ss)
		Path, Access string
	}
)

func binds(paths []string) []bind {
	b := make([]bind, 0, len(paths))
	for _, p := range paths {
		b = append(b, bind{Source: p, Destination: p, IgnoreMissing: true, Flags: unix.MS_REC})
	}
	return b
}

// within marks paths as those in the unit's root (+), which may be missing (-).
func within(paths []string) []string {
	w := make([]string, 0, len(paths))
	for _, p := range paths {
		w = append(w, "-+"+p)
	}
	return w
}

func allow(devices []string, access string) []device {
	a := make([]device, 0, len(devices))
	for _, d := range devices {
		a = append(a, device{d, access})
	}
	return a
}

func property(name string, value any) systemd.Property {
	return systemd.Property{Name: name, Value: dbus.MakeVariant(value)}
}

func microseconds(d time.Duration) uint64 { return uint64(d.Microseconds()) }
