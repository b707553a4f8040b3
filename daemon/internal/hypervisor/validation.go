package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"libvirt.org/go/libvirt"
)

// validationNamespace marks, in a definition's metadata, a domain that a backup
// is tried with. Whoever looks for domains is not told of these: they are
// nobody's to see, back up or restore.
const validationNamespace = "https://virtbackup.org/xmlns/validation/1"

const validationPrefix = "virtbackup-validation-"

// ValidationName is the name of the domain of a job.
func ValidationName(job string) string { return validationPrefix + strings.ToLower(job) }

// ValidationDomain is the temporary domain that a backup is tried with.
type ValidationDomain struct {
	Job, Backup string // ULIDs
	UUID        string
	Disks       map[string]ValidationDisk // by target; all others are left out
	NVRAM       string                    // path of a copy of the variable store, or where libvirt is to make one; not used without UEFI
	Memory      uint64                    // bytes that it may have; 0: as many as the original
	CPUs        int                       // that it may have; 0: as many as the original
	// Where kernel and initrd of direct boot may be, see Changes.
	BootDirectories, BootFiles []string
}

// ValidationDisk is a disk of it: an overlay on what is served at a socket.
type ValidationDisk struct {
	Overlay string // path of a qcow2 image without a backing file of its own
	Socket  string // of an NBD server whose export has the target's name
}

// ValidationDefinition makes the definition of a temporary domain from one that
// may come from an untrusted repository: by the allow-list of NewDefinition, and
// without whatever connects the guest to anything or lets somebody look at it:
// networks, displays, host devices, redirection, sound, shared memory.
func ValidationDefinition(doc []byte, v ValidationDomain) (string, error) {
	c := Changes{
		Name: ValidationName(v.Job), UUID: v.UUID, DropInterfaces: true, Disks: map[string]NewDisk{}, SkipOtherDisks: true,
		NVRAM: v.NVRAM, BootDirectories: v.BootDirectories, BootFiles: v.BootFiles,
		Title: "virtbackup: validation of backup " + v.Backup, Description: "A temporary domain, removed when the validation ends.",
	}
	for target, d := range v.Disks {
		if !filepath.IsAbs(d.Socket) {
			return "", fmt.Errorf("cannot make a definition: %q is not an absolute path", d.Socket)
		}
		c.Disks[target] = NewDisk{Path: d.Overlay, Format: "qcow2"}
	}
	root, _, err := newDefinition(doc, c)
	if err != nil {
		return "", err
	}
	if err = onlyOnce(root); err == nil {
		err = v.cap(root)
	}
	if err != nil {
		return "", fmt.Errorf("cannot make a definition: %w", err)
	}
	if os := root.child("os"); !keepsVariables(os) {
		os.remove("nvram")
	}
	for _, name := range []string{"on_poweroff", "on_crash"} {
		root.replace(&element{name: name, text: "destroy"})
	}
	root.replace(&element{name: "on_reboot", text: "restart"})
	root.replace(&element{name: "metadata", children: []*element{{
		name: "virtbackup:validation", attrs: []attribute{{"xmlns:virtbackup", validationNamespace}, {"job", v.Job}, {"backup", v.Backup}},
	}}})
	if devices := root.child("devices"); devices != nil {
		v.isolate(devices)
	}
	return root.marshal()
}

// onlyOnce refuses what libvirt never writes, and would read the other one of.
func onlyOnce(root *element) error {
	seen := map[string]bool{}
	for _, e := range root.children {
		if seen[e.name] && e.name != "sysinfo" {
			return fmt.Errorf("the definition has more than one %s", e.name)
		}
		seen[e.name] = true
	}
	return nil
}

// cap bounds what it takes of the host.
func (v ValidationDomain) cap(root *element) error {
	for _, name := range []string{
		"maxMemory", "memtune", "memoryBacking", "vcpus", "iothreads", "iothreadids", "cputune", "numatune", "blkiotune", "pm",
	} {
		root.remove(name)
	}
	memory := root.child("memory")
	if memory == nil {
		return errors.New("the definition has no memory")
	}
	kib, err := kibibytes(memory)
	if err != nil {
		return err
	}
	if most := v.Memory >> 10; most > 0 && kib > most {
		kib = most
	}
	text := strconv.FormatUint(kib, 10)
	root.remove("currentMemory")
	root.replace(&element{name: "memory", attrs: []attribute{{"unit", "KiB"}}, text: text})
	cpus := 1
	if vcpu := root.child("vcpu"); vcpu != nil {
		if cpus, err = strconv.Atoi(strings.TrimSpace(vcpu.text)); err != nil || cpus < 1 {
			return fmt.Errorf("%q is no number of virtual CPUs", vcpu.text)
		}
	}
	if v.CPUs > 0 {
		cpus = min(cpus, v.CPUs)
	}
	root.replace(&element{name: "vcpu", text: strconv.Itoa(cpus)})
	if features := root.child("features"); features != nil {
		features.remove("tcg") // how much memory QEMU takes for itself
	}
	if cpu := root.child("cpu"); cpu != nil { // they would have to fit
		cpu.remove("topology")
		cpu.remove("numa")
	}
	return nil
}

// kibibytes reads an amount of memory (libvirt, virScaleInteger).
func kibibytes(e *element) (uint64, error) {
	unit := strings.ToLower(e.attr("unit"))
	factors := map[string]uint64{
		"": 1 << 10, "b": 1, "bytes": 1, "k": 1 << 10, "kib": 1 << 10, "kb": 1e3, "m": 1 << 20, "mib": 1 << 20, "mb": 1e6,
		"g": 1 << 30, "gib": 1 << 30, "gb": 1e9, "t": 1 << 40, "tib": 1 << 40, "tb": 1e12,
	}
	n, err := strconv.ParseUint(strings.TrimSpace(e.text), 10, 64)
	factor := factors[unit]
	if err != nil || n == 0 || factor == 0 || n > 1<<62/factor {
		return 0, fmt.Errorf("%q %q is no amount of memory", e.text, e.attr("unit"))
	}
	return max(n*factor>>10, 1), nil
}

// keepsVariables tells whether the firmware has a variable store. Where none is
// named, libvirt makes one in a place of its own, and leaves it there.
func keepsVariables(os *element) bool {
	loader := os.child("loader")
	if loader != nil && loader.attr("stateless") == "yes" {
		return false
	}
	return os.attr("firmware") == "efi" || loader != nil && loader.attr("type") == "pflash"
}

// isolated are the devices that connect a guest to nothing but its disks and us.
func isolated() []string {
	return []string{
		"disk", "controller", "hub", "input", "video", "serial", "console", "parallel", "channel", "tpm", "rng", "panic", "memballoon",
	}
}

// isolate takes away what connects the guest to anything but its disks and us.
func (v ValidationDomain) isolate(devices *element) {
	var kept []*element
	screens := 0
	for _, d := range devices.children {
		if !contains(isolated(), d.name) || d.attr("type") == "spicevmc" {
			continue
		}
		if d.name == "video" {
			if screens++; screens > 1 { // only the first is looked at
				continue
			}
		}
		switch d.name {
		case "controller":
			if driver := d.child("driver"); driver != nil {
				driver.unset("iothread")
			}
		case "video":
			plainScreen(d)
		case "disk":
			v.stack(d)
		}
		kept = append(kept, d)
	}
	devices.children = kept
	if devices.child("video") == nil { // there is to be a screen to look at
		devices.children = append(devices.children, &element{name: "video", children: []*element{{name: "model", attrs: []attribute{{"type", "vga"}}}}})
	}
}

// plainScreen makes a screen one that needs no display on the host, and no more
// of its memory than QEMU takes by itself.
func plainScreen(video *element) {
	model := video.child("model")
	if model == nil || model.attr("type") == "qxl" || model.attr("type") == "none" {
		video.replace(&element{name: "model", attrs: []attribute{{"type", "vga"}}})
		video.remove("address") // of another kind of device
		return
	}
	model.remove("acceleration")
	model.remove("resolution")
	model.unset("blob", "ram", "vram", "vram64", "vgamem", "heads")
	video.replace(model) // of several, this one
}

// stack puts a disk's overlay on what is served.
func (v ValidationDomain) stack(disk *element) {
	if driver := disk.child("driver"); driver != nil {
		driver.unset("iothread", "io", "cache", "queues", "error_policy", "rerror_policy", "copy_on_read")
		driver.set("cache", "unsafe") // nobody needs it afterwards
	}
	disk.remove("iotune")
	target := disk.child("target")
	if target == nil {
		return
	}
	d, ours := v.Disks[target.attr("dev")]
	if !ours {
		return
	}
	disk.replace(&element{name: "backingStore", attrs: []attribute{{"type", "network"}}, children: []*element{
		{name: "format", attrs: []attribute{{"type", "raw"}}},
		{
			name: "source", attrs: []attribute{{"protocol", "nbd"}, {"name", target.attr("dev")}},
			children: []*element{{name: "host", attrs: []attribute{{"transport", "unix"}, {"socket", d.Socket}}}},
		},
		{name: "backingStore"},
	}})
}

// markPattern finds the job in the mark of a definition as libvirt writes it.
var markPattern = regexp.MustCompile(`<[^<>]*:validation\b[^<>]*\bjob=["']([0-9A-Z]{26})["']`)

// validationOf tells the job that a domain is for, by its metadata; "" for a
// domain of somebody's. That includes one that was defined by a copy of ours: it
// has another name.
func validationOf(name, metadata string) string {
	if !strings.Contains(metadata, validationNamespace) {
		return ""
	}
	m := markPattern.FindStringSubmatch(metadata)
	if m == nil || name != ValidationName(m[1]) {
		return ""
	}
	return m[1]
}

// StartValidation starts a temporary domain, of which libvirt knows nothing any
// more once it has ended.
func (h *Hypervisor) StartValidation(ctx context.Context, definition string) error {
	_, err := withConnect(ctx, h, "start a domain for a validation", func(c *libvirt.Connect) (struct{}, error) {
		d, err := c.DomainCreateXML(definition, libvirt.DOMAIN_NONE)
		if err == nil {
			freeDomain(d)
		}
		return struct{}{}, err
	})
	return err
}

// EndValidation ends a temporary domain at once. It is fine when there is none.
func (h *Hypervisor) EndValidation(ctx context.Context, uuid string) error {
	err := h.onDomain(ctx, uuid, "end", func(d *libvirt.Domain) error { return d.Destroy() })
	if errors.Is(err, ErrNoDomain) {
		return nil
	}
	return err
}

// Validation is a temporary domain that is there.
type Validation struct{ UUID, Job string }

// Validations returns the temporary domains that are there.
func (h *Hypervisor) Validations(ctx context.Context) ([]Validation, error) {
	return withConnect(ctx, h, "list the domains of validations", func(c *libvirt.Connect) ([]Validation, error) {
		all, err := c.ListAllDomains(libvirt.CONNECT_LIST_DOMAINS_TRANSIENT)
		if err != nil {
			return nil, err
		}
		var list []Validation
		for i := range all {
			d := &all[i]
			uuid, err := d.GetUUIDString()
			name, errName := d.GetName()
			text, errMetadata := d.GetMetadata(libvirt.DOMAIN_METADATA_ELEMENT, validationNamespace, libvirt.DOMAIN_AFFECT_LIVE)
			freeDomain(d)
			m := markedJob.FindStringSubmatch(text)
			if errors.Join(err, errName, errMetadata) == nil && m != nil && name == ValidationName(m[1]) {
				list = append(list, Validation{UUID: uuid, Job: m[1]})
			}
		}
		return list, nil
	})
}

// markedJob finds the job in the mark alone.
var markedJob = regexp.MustCompile(`\bjob=["']([0-9A-Z]{26})["']`)

// maximumScreenshot bounds an image of a screen, in bytes: 4096 by 4096 pixels.
const maximumScreenshot = 48<<20 + 64

// Screenshot returns what the first screen of a running domain shows, as QEMU
// gives it: PPM, or PNG.
func (h *Hypervisor) Screenshot(ctx context.Context, uuid string) ([]byte, error) {
	return withConnect(ctx, h, "take a screenshot of domain "+uuid, func(c *libvirt.Connect) ([]byte, error) {
		d, err := c.LookupDomainByUUIDString(uuid)
		if err != nil {
			return nil, err
		}
		defer freeDomain(d)
		stream, err := c.NewStream(0)
		if err != nil {
			return nil, err
		}
		defer func() { _ = stream.Free() }()
		if _, err := d.Screenshot(stream, 0, 0); err != nil {
			return nil, err
		}
		picture, err := io.ReadAll(io.LimitReader(receiver{stream}, maximumScreenshot+1))
		if err == nil && len(picture) > maximumScreenshot {
			err = fmt.Errorf("the screen is too large: more than %d bytes", maximumScreenshot)
		}
		if err != nil {
			_ = stream.Abort()
			return nil, err
		}
		return picture, stream.Finish()
	})
}

// receiver reads what libvirt sends.
type receiver struct{ *libvirt.Stream }

func (r receiver) Read(p []byte) (int, error) {
	n, err := r.Recv(p)
	if err == nil && n == 0 {
		err = io.EOF
	}
	return max(n, 0), err
}
