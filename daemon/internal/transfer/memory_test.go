package transfer

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// memoryLimit is what the worker may take, in KiB, whatever the disks' sizes.
const memoryLimit = 128 << 10

// TestMemory measures the program on big disks, side by side, compressed as
// well as can be, as on a host with many processors.
func TestMemory(t *testing.T) {
	program := buildWorker(t)
	h := newHost(t)
	var disks []disk
	for i := range 5 {
		size := uint64(64 << 30)
		if i == 0 {
			size = 64 << 40
		}
		d := h.disk(fmt.Sprintf("vd%c", 'a'+i), "qcow2", size)
		d.io(h, "write -P 1 0 32M", "write -P 2 20G 32M", "write -P 3 63G 1M")
		disks = append(disks, d)
	}
	id := h.id()
	b := h.backupSpec(id, "", id, disks...)
	b.Level = 22
	stop := h.serve(b, disks...)
	dir := h.job(Spec{Operation: OperationBackup, Backup: b})
	h.letGo(dir)
	checkMemory(t, program, dir)
	stop()
	// Every second cluster, so that the parts of extents are copied.
	for _, d := range disks {
		var scattered []string
		for at := range 512 {
			scattered = append(scattered, fmt.Sprintf("write -P 9 %d 4k", at<<17))
		}
		d.io(h, scattered...)
	}
	increment := h.backupSpec(h.id(), id, id, disks...)
	for i := range disks {
		increment.find(i, repository.ChangesDigest)
	}
	increment.Level = 22
	stop = h.serve(increment, disks...)
	dir = h.job(Spec{Operation: OperationBackup, Backup: increment})
	h.letGo(dir)
	checkMemory(t, program, dir)
	stop()
	id = increment.Manifest.Backup
	s := &RestoreSpec{Backup: id}
	for _, d := range disks {
		s.Disks = append(s.Disks, RestoreDisk{Target: d.target, Directory: h.dir, Destination: d.target + ".restored", Format: FormatQcow2})
	}
	checkMemory(t, program, h.job(Spec{Operation: OperationRestore, Restore: s}))
	checkMemory(t, program, h.job(Spec{Operation: OperationVerify, Backups: []string{id}}))
	h.command("qemu-img", "compare", disks[2].path, filepath.Join(h.dir, disks[2].target+".restored"))
	serve := h.serveSpec(id, "vda", "vdb", "vdc", "vdd", "vde")
	dir = h.job(Spec{Operation: OperationServe, Serve: serve})
	go func() {
		awaitPhase(h, dir, PhaseServing)
		var readers sync.WaitGroup
		for _, d := range serve.Disks[1:] { // the first is nothing but a hole for minutes
			readers.Go(func() {
				out, err := exec.Command("nbdcopy", "--request-size=4194304", "nbd+unix:///?socket="+d.Socket, "null:").CombinedOutput()
				if err != nil {
					t.Errorf("%s: %v: %s", d.Target, err, out)
				}
			})
		}
		readers.Wait()
		if err := WriteStop(dir); err != nil {
			t.Error(err)
		}
	}()
	checkMemory(t, program, dir)
}

func checkMemory(t *testing.T, program, dir string) {
	t.Helper()
	c := exec.Command(program, dir)
	c.Env = append(os.Environ(), "GOMAXPROCS=32")
	c.Stderr = os.Stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	used := watchPeak(c)
	if err := c.Wait(); err != nil {
		t.Fatal(err)
	}
	spec, err := ReadSpec(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %d MiB", spec.Operation, used>>10)
	if used == 0 || used > memoryLimit {
		t.Errorf("%s took %d MiB", spec.Operation, used>>10)
	}
}

// watchPeak returns the most memory that a program took, in KiB, once it has
// ended. The kernel's own account, ru_maxrss, begins with what the test took
// when it made the process.
func watchPeak(c *exec.Cmd) (peak int64) {
	for {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.Process.Pid))
		_, after, alive := strings.Cut(string(status), "VmHWM:")
		if err != nil || !alive {
			return peak // a process that has ended has no memory
		}
		if now, err := strconv.ParseInt(strings.Fields(after)[0], 10, 64); err == nil {
			peak = now
		}
		time.Sleep(5 * time.Millisecond)
	}
}
