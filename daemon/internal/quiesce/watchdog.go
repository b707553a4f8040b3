package quiesce

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

// ThawUnit is the thaw watchdog as a transient unit of systemd: it survives
// the daemon, its SIGKILL and the stop of its unit.
type ThawUnit struct {
	Program string // "" = /usr/libexec/virtbackup/virtbackup-thaw
	URI     string // of libvirt
}

// Start implements Watchdog. The unit counts as started when the watchdog says
// that it watches (Type=notify).
func (u ThawUnit) Start(ctx context.Context, marker string) error {
	program := u.Program
	if program == "" {
		program = "/usr/libexec/virtbackup/virtbackup-thaw"
	}
	name := fmt.Sprintf("virtbackup-thaw-%s-%s.service", filepath.Base(marker), strconv.FormatInt(time.Now().UnixNano(), 36))
	cmd := exec.CommandContext(ctx, "systemd-run", "--quiet", "--collect", "--unit="+name,
		"--description=Thaw watchdog of virtbackup",
		"--property=Type=notify", "--property=TimeoutStartSec=30",
		// At shutdown of the host it is stopped before libvirtd.
		"--property=After=libvirtd.service",
		"--property=OOMScoreAdjust=-900",
		"--", program, "--connect="+u.URI, marker)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot start %s: %w: %s", name, err, out)
	}
	return nil
}
