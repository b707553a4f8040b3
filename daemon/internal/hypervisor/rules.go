package hypervisor

import "strings"

// rule says what may stay of an element. What no rule names is dropped.
//
// Attributes and text may hold plain words only (see plain): no value with a
// slash passes unless a fix makes it or text says free, so that no rule lets a
// path through by accident.
type rule struct {
	attrs    string           // allowed attributes, separated by spaces
	children map[string]*rule // allowed children
	text     textRule
	any      bool // all attributes, text and children, as long as they are plain
	silent   bool // dropped, but not worth telling: libvirt fills it in itself
	// fix changes the filtered element to what is allowed, given the original.
	// It returns false to drop it.
	fix func(r *rebuild, original, e *element) (bool, error)
}

type textRule int

const (
	textNone  textRule = iota
	textPlain          // plain words only
	textFree           // anything: libvirt gives it to the guest, or shows it
)

type rules = map[string]*rule

var (
	free      = &rule{text: textFree}
	word      = &rule{text: textPlain}
	anything  = &rule{any: true}
	silently  = &rule{silent: true}
	attribs   = func(names string) *rule { return &rule{attrs: names} }
	bootOrder = attribs("order loadparm")
)

// definitionRules is the allow-list of a domain's definition.
func definitionRules() *rule {
	return &rule{
		attrs: "type",
		fix:   fixDomain,
		children: rules{
			"name": free, "uuid": word, "title": free, "description": free,
			"genid":     {fix: func(*rebuild, *element, *element) (bool, error) { return true, nil }}, // empty: a new one
			"memory":    {attrs: "unit dumpCore", text: textPlain},
			"maxMemory": {attrs: "unit slots", text: textPlain},
			"memtune":   anything, "memoryBacking": anything,
			"currentMemory": {attrs: "unit", text: textPlain},
			"vcpu":          {attrs: "placement cpuset current", text: textPlain},
			"vcpus":         anything, "iothreads": word, "iothreadids": anything, "cputune": anything, "numatune": anything,
			"blkiotune": {children: rules{"weight": word}},
			"resource":  silently,
			"sysinfo":   {attrs: "type", fix: fixSysinfo, children: sysinfoRules()},
			"os":        osRules(),
			"features":  anything, "cpu": anything, "clock": {attrs: "offset adjustment basis start", fix: fixClock, children: rules{"timer": anything}},
			"on_poweroff": word, "on_reboot": word, "on_crash": word, "pm": anything,
			"devices": {children: deviceRules()},
		},
	}
}

func sysinfoRules() rules {
	section := &rule{children: rules{"entry": {attrs: "name", text: textFree}}}
	return rules{"bios": section, "system": section, "baseBoard": section, "chassis": section, "oemStrings": section}
}

func osRules() *rule {
	return &rule{
		attrs: "firmware",
		fix:   fixOS,
		children: rules{
			"type":     {attrs: "arch machine", text: textPlain},
			"firmware": {children: rules{"feature": attribs("enabled name")}},
			"loader":   {attrs: "readonly secure type stateless format", text: textFree, fix: fixLoader},
			"nvram":    {attrs: "format", fix: fixNVRAM},
			"kernel":   {text: textFree, fix: fixBootFile}, "initrd": {text: textFree, fix: fixBootFile}, "cmdline": free,
			"boot": attribs("dev"), "bootmenu": attribs("enable timeout"), "smbios": attribs("mode"), "bios": attribs("useserial rebootTimeout"),
		},
	}
}

func deviceRules() rules {
	chardev := &rule{
		attrs: "type", fix: fixChardev,
		children: rules{
			"target":  {attrs: "type name port", children: rules{"model": attribs("name")}},
			"address": anything, "alias": silently,
		},
	}
	r := rules{
		"emulator": silently,
		"disk":     diskRules(), "interface": interfaceRules(), "graphics": graphicsRules(),
		"serial": chardev, "console": chardev, "parallel": chardev, "channel": chardev,
		"controller": {attrs: "type index model ports vectors", children: rules{
			"model": attribs("name"), "target": anything, "driver": anything, "pcihole64": {attrs: "unit", text: textPlain}, "master": attribs("startport"),
		}},
		"input": {attrs: "type bus model", fix: only("type", "mouse", "tablet", "keyboard")},
		"video": {children: rules{"model": {
			attrs:    "type ram vram vram64 vgamem heads primary blob",
			children: rules{"acceleration": {attrs: "accel2d accel3d", fix: notEmpty}, "resolution": attribs("x y")},
		}}},
		"sound":      {attrs: "model", children: rules{"codec": attribs("type"), "audio": attribs("id")}},
		"audio":      {attrs: "id type", fix: only("type", "none", "spice")},
		"hub":        attribs("type"),
		"watchdog":   {attrs: "model action", fix: only("action", "", "reset", "shutdown", "poweroff", "pause", "none", "inject-nmi")},
		"memballoon": {attrs: "model autodeflate freePageReporting", children: rules{"stats": attribs("period"), "driver": anything}},
		"panic":      attribs("model"),
		"iommu":      {attrs: "model", children: rules{"driver": anything}},
		"vsock":      {attrs: "model", fix: fixVsock},
		"rng": {attrs: "model", fix: fixRNG, children: rules{
			"backend": {attrs: "model", text: textFree}, "rate": attribs("bytes period"), "driver": anything,
		}},
		"tpm": {attrs: "model", fix: fixTPM, children: rules{"backend": {
			attrs: "type version persistent_state", children: rules{"encryption": attribs("secret"), "active_pcr_banks": anything, "profile": attribs("name")},
		}}},
		"redirdev": {attrs: "bus type", fix: only("type", "spicevmc")},
		"memory":   {attrs: "model", fix: only("model", "dimm"), children: rules{"target": anything}},
	}
	for _, device := range r {
		if device.children == nil {
			if device.silent || device.any {
				continue
			}
			device.children = rules{}
		}
		device.children["address"] = anything
		device.children["alias"] = silently
	}
	return r
}

func diskRules() *rule {
	return &rule{
		attrs: "device model",
		fix:   fixDisk,
		children: rules{
			"driver": attribs("cache io discard detect_zeroes queues queue_size iothread error_policy rerror_policy " +
				"event_idx ioeventfd copy_on_read packed iommu ats"),
			"target":  attribs("dev bus tray removable rotation_rate"),
			"blockio": attribs("logical_block_size physical_block_size discard_granularity"), "geometry": anything,
			"iotune": anything, "readonly": {}, "serial": free, "wwn": word, "vendor": free, "product": free, "boot": bootOrder,
			"source": silently, "backingStore": silently, "mirror": silently, // the source comes from Changes
		},
	}
}

func interfaceRules() *rule {
	return &rule{
		attrs: "type trustGuestRxFilters",
		fix:   fixInterface,
		children: rules{
			"mac": attribs("address type"), "source": attribs("network portgroup bridge dev mode"),
			"model": attribs("type"), "link": attribs("state"), "mtu": attribs("size"), "boot": bootOrder,
			"driver":    attribs("name txmode ioeventfd event_idx queues rx_queue_size tx_queue_size packed iommu ats rss"),
			"bandwidth": anything, "vlan": anything, "virtualport": anything, "port": attribs("isolated"),
			"filterref": {attrs: "filter", children: rules{"parameter": attribs("name value")}},
			"rom":       attribs("bar enabled"), "tune": anything, "target": silently,
		},
	}
}

func graphicsRules() *rule {
	return &rule{
		attrs: "type keymap sharePolicy",
		fix:   fixGraphics,
		children: rules{
			"image": attribs("compression"), "jpeg": attribs("compression"), "zlib": attribs("compression"),
			"playback": attribs("compression"), "streaming": attribs("mode"), "clipboard": attribs("copypaste"),
			"mouse": attribs("mode"), "filetransfer": attribs("enable"), "gl": attribs("enable"), "listen": silently,
		},
	}
}

// plain tells whether a value can be no path, option list or markup: letters,
// digits and a few signs that numbers, versions, addresses and names are made of.
func plain(s string) bool {
	for _, c := range s {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case strings.ContainsRune(" \t\n._-+:,^@()", c):
		default:
			return false
		}
	}
	return !strings.Contains(s, "..")
}
