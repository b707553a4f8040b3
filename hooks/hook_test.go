package main

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/virtbackup/virtbackup/dbus/bustest"
	"github.com/virtbackup/virtbackup/hooks/fingerprint"
	"github.com/virtbackup/virtbackup/hooks/spool"
)

// directoryVariable makes the test's program the hook, with that spool.
const directoryVariable = "HOOK_TEST_DIRECTORY"

// program is the test's program again, but never with the race detector: with
// that it takes longer to start than libvirt would wait.
var program string

func TestMain(m *testing.M) {
	directory := os.Getenv(directoryVariable)
	switch {
	case os.Args[0] == recorderName:
		recorder(os.Args)
	case directory != "":
		hook(os.Args, directory)
	default:
		os.Exit(withProgram(m.Run))
	}
}

func withProgram(run func() int) int {
	dir, err := os.MkdirTemp("", "hook-test-")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	program = dir + "/hook"
	if out, err := exec.Command("go", "test", "-c", "-o", program, ".").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "cannot build the hook: %v: %s", err, out)
		return 1
	}
	return run()
}

const (
	uuid       = "0d4c1f2e-93a6-4b6e-9a53-2f6c0d9b1a77"
	definition = "<domain type='qemu' id='7'>\n  <name>web</name>\n  <uuid>" + uuid + "</uuid><devices>%s</devices></domain>\n"
)

func diskXML(target, format, path string) string {
	return fmt.Sprintf("<disk type='file' device='disk'><driver name='qemu' type='%s'/><source file='%s'/><target dev='%s'/></disk>", format, path, target)
}

// hookCommand is the hook as libvirt would call it, on a bus where nobody is.
func hookCommand(t *testing.T, directory, address string, args ...string) *exec.Cmd {
	t.Helper()
	c := exec.Command(program)
	c.Args = append([]string{"/etc/libvirt/hooks/qemu.d/virtbackup"}, args...)
	c.Env = []string{directoryVariable + "=" + directory, "DBUS_SYSTEM_BUS_ADDRESS=" + address}
	return c
}

// callHook runs the hook, which must end well and print nothing on stdout, and
// returns what it says on stderr.
func callHook(t *testing.T, directory, address, stdin string, args ...string) string {
	t.Helper()
	c := hookCommand(t, directory, address, args...)
	var out, complaint bytes.Buffer
	c.Stdin, c.Stdout, c.Stderr = strings.NewReader(stdin), &out, &complaint
	if err := c.Run(); err != nil {
		t.Errorf("%q: %v: %s", args, err, complaint.String())
	}
	if out.Len() > 0 {
		t.Errorf("%q: %q on stdout", args, out.String())
	}
	return complaint.String()
}

func entries(t *testing.T, directory string) []spool.Entry {
	t.Helper()
	all, err := spool.Read(directory)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestEveryOperationIsRecorded(t *testing.T) {
	directory := t.TempDir() + "/spool"
	disk := t.TempDir() + "/disk"
	if err := os.WriteFile(disk, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	xml := fmt.Sprintf(definition, diskXML("vda", "raw", disk))
	operations := []string{"prepare", "start", "started", "stopped", "release", "migrate", "restore", "reconnect", "attach", "of-the-future"}
	for _, o := range operations {
		c := call{directory: directory, libvirt: spool.Process(os.Getpid()), deadline: monotonic() + time.Hour, args: []string{"web", o, "begin", "-"}}
		c, err := decode(c.encode())
		if err == nil {
			err = c.record(t.Context(), strings.NewReader(xml))
		}
		if err != nil {
			t.Errorf("%s: %v", o, err)
		}
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	var before int64
	all := entries(t, directory)
	if len(all) != len(operations) {
		t.Fatalf("%d records of %d", len(all), len(operations))
	}
	for i, e := range all {
		r := e.Record
		if e.Err != nil || r.Time < before {
			t.Errorf("%d: %+v", i, e)
		}
		before, r.Time = r.Time, 0
		want := spool.Record{
			Version: spool.Version, Boot: strings.TrimSpace(string(boot)), Libvirt: spool.Process(os.Getpid()), Domain: uuid, Name: "web",
			DomainID: 7, Operation: operations[i], SubOperation: "begin", Extra: "-", XML: xml,
		}
		if o := operations[i]; o == "prepare" || o == "release" {
			want.Disks = []fingerprint.Disk{fingerprint.Take(t.Context(), fingerprint.Source{Target: "vda", Path: disk, Format: "raw"})}
		}
		if diff := cmp.Diff(want, r); diff != "" {
			t.Errorf("%s: %s", operations[i], diff)
		}
	}
}

// A temporary domain of ours is nobody's to track; whatever only looks like one is.
func TestValidationsAreNotRecorded(t *testing.T) {
	const job = "01KB5W3V9M8Q4T2R7XYZ0A1B2C"
	const prefix = "virtbackup-validation-"
	for _, test := range []struct {
		name, job, namespace string
		recorded             bool
	}{
		{prefix + strings.ToLower(job), job, "https://virtbackup.org/xmlns/validation/1", false},
		{prefix + strings.ToLower(job), job, "https://example.org", true},
		{prefix + strings.ToLower(job), strings.ToLower(job), "https://virtbackup.org/xmlns/validation/1", true},
		{prefix, "", "https://virtbackup.org/xmlns/validation/1", true},
		{prefix + "x", "X", "https://virtbackup.org/xmlns/validation/1", true},
		{prefix + strings.ToLower(job) + "x", job + "X", "https://virtbackup.org/xmlns/validation/1", true},
		{prefix + strings.ToLower(job) + "\n", job + "\n", "https://virtbackup.org/xmlns/validation/1", true},
		{"web", job, "https://virtbackup.org/xmlns/validation/1", true},
	} {
		var escaped strings.Builder
		if err := xml.EscapeText(&escaped, []byte(test.job)); err != nil {
			t.Fatal(err)
		}
		mark := fmt.Sprintf("<metadata><v:validation xmlns:v='%s' job='%s' backup='b'/></metadata><devices>", test.namespace, escaped.String())
		directory := t.TempDir()
		c := call{directory: directory, libvirt: spool.Process(os.Getpid()), deadline: monotonic() + time.Hour, args: []string{test.name, "started", "begin", "-"}}
		if err := c.record(t.Context(), strings.NewReader(strings.Replace(fmt.Sprintf(definition, ""), "<devices>", mark, 1))); err != nil {
			t.Errorf("%q: %v", test.name, err)
		}
		all, err := spool.Read(directory)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if (len(all) > 0) != test.recorded {
			t.Errorf("%q with job %q: %d records", test.name, test.job, len(all))
		}
	}
}

// The one who called the program, and not what comes between, is libvirt.
func TestLibvirtIsWhoCalls(t *testing.T) {
	directory := t.TempDir()
	if complaint := callHook(t, directory, bustest.Start(t), fmt.Sprintf(definition, ""), "web", "reconnect", "begin", "extra"); complaint != "" {
		t.Error(complaint)
	}
	r := eventually(t, func() ([]spool.Entry, bool) { all := entries(t, directory); return all, len(all) > 0 })[0].Record
	if pid, start, _ := strings.Cut(r.Libvirt, "@"); pid != fmt.Sprint(os.Getpid()) || start == "" || r.Libvirt != spool.Process(os.Getpid()) {
		t.Errorf("libvirt is %q", r.Libvirt)
	}
	if got := fmt.Sprint(r.Name, " ", r.Operation, " ", r.SubOperation, " ", r.Extra); got != "web reconnect begin extra" {
		t.Error(got)
	}
}

// Whatever libvirt, or anybody, gives it: it ends with 0, says nothing on
// stdout, and records what there is.
func TestBadInput(t *testing.T) {
	var thousand strings.Builder
	for i := range 1000 {
		thousand.WriteString(diskXML(fmt.Sprint("d", i), "qcow2", fmt.Sprint("/nowhere/", i)))
	}
	address := bustest.Start(t)
	for name, c := range map[string]struct {
		stdin   string
		args    []string
		records int
		domain  string
		disks   int
	}{
		"no arguments":     {args: nil},
		"no operation":     {args: []string{"web"}},
		"no sub-operation": {args: []string{"web", "prepare"}, records: 1},
		"many arguments":   {args: []string{"web", "prepare", "begin", "-", "-", "-"}, records: 1},
		"odd name":         {args: []string{"--help\n", "prepare", "begin", "-"}, records: 1},
		"empty":            {args: []string{"web", "prepare", "begin", "-"}, records: 1},
		"no XML":           {stdin: "\x00\xff<<<", args: []string{"web", "prepare", "begin", "-"}, records: 1},
		"half":             {stdin: definition[:40], args: []string{"web", "release", "end", "-"}, records: 1},
		"huge":             {stdin: "<domain><name>" + strings.Repeat("x", maxXML) + "</name></domain>", args: []string{"web", "release", "end", "-"}, records: 1},
		"largest":          {stdin: "<domain><uuid>" + uuid + "</uuid>" + strings.Repeat(" ", maxXML-67) + "</domain>", args: []string{"web", "start", "begin", "-"}, records: 1, domain: uuid},
		"1000 disks":       {stdin: fmt.Sprintf(definition, thousand.String()), args: []string{"web", "prepare", "begin", "-"}, records: 1, domain: uuid, disks: 1000},
		"no target":        {stdin: fmt.Sprintf(definition, "<disk><source file='/a'/></disk>"), args: []string{"web", "prepare", "begin", "-"}, records: 1, domain: uuid},
	} {
		t.Run(name, func(t *testing.T) {
			directory := t.TempDir()
			complaint := callHook(t, directory, address, c.stdin, c.args...)
			// One as large as that may not be written yet when libvirt stops waiting.
			all := eventually(t, func() ([]spool.Entry, bool) { all := entries(t, directory); return all, len(all) >= c.records })
			if len(all) != c.records || len(complaint) > maxComplaint {
				t.Fatalf("%d records; %s", len(all), complaint)
			}
			for _, e := range all {
				r := e.Record
				if e.Err != nil || r.Domain != c.domain || len(r.Disks) != c.disks || r.Name != c.args[0] || r.Operation != c.args[1] {
					t.Errorf("%v: domain %q, name %q, operation %q, %d disks", e.Err, r.Domain, r.Name, r.Operation, len(r.Disks))
				}
			}
		})
	}
}

// eventually waits until something is so. The test's own limit ends it.
func eventually[T any](t *testing.T, get func() (T, bool)) T {
	t.Helper()
	for {
		v, ok := get()
		if ok {
			return v
		}
		select {
		case <-t.Context().Done():
			t.Fatal("it never is")
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func TestASpoolThatCannotBeWrittenFailsNobody(t *testing.T) {
	directory := t.TempDir() + "/file"
	if err := os.WriteFile(directory, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	complaint := callHook(t, directory, bustest.Start(t), fmt.Sprintf(definition, ""), "web", "start", "begin", "-")
	if !strings.Contains(complaint, `cannot record what happened to domain "web"`) {
		t.Errorf("it says %q", complaint)
	}
}

// libvirt waits until all have closed the streams that the hook got. Nobody
// may listen to them either, or have sent anything.
func TestStreams(t *testing.T) {
	directory, address := t.TempDir(), bustest.Start(t)
	signal.Ignore(syscall.SIGPIPE)
	defer signal.Reset(syscall.SIGPIPE)
	never, keepOpen, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer keepOpen.Close()
	closed, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	_ = closed.Close()
	for name, c := range map[string]struct{ stdin, out *os.File }{
		"no end of stdin":        {stdin: never},
		"nobody reads its words": {out: w},
	} {
		h := hookCommand(t, directory, address, "web", "start", "begin", "-")
		if c.stdin != nil {
			h.Stdin = c.stdin
		}
		if c.out != nil {
			h.Stdout, h.Stderr = c.out, c.out
		}
		if err := h.Run(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if all := eventually(t, func() ([]spool.Entry, bool) { all := entries(t, directory); return all, len(all) >= 2 }); len(all) != 2 {
		t.Error(all)
	}
}

func TestSignalsAreHarmless(t *testing.T) {
	directory := t.TempDir()
	stdin, keepOpen, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	c := hookCommand(t, directory, bustest.Start(t), "web", "start", "begin", "-")
	c.Stdin = stdin
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	// It ignores them when the recorder is there.
	eventually(t, func() (bool, bool) {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", c.Process.Pid, c.Process.Pid))
		return true, len(children) > 0 || err != nil
	})
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE} {
		_ = c.Process.Signal(s) // it may be over
	}
	_ = stdin.Close()
	if _, err := fmt.Fprintf(keepOpen, definition, ""); err != nil {
		t.Fatal(err)
	}
	_ = keepOpen.Close()
	if err := c.Wait(); err != nil {
		t.Error(err)
	}
	all := eventually(t, func() ([]spool.Entry, bool) { all := entries(t, directory); return all, len(all) > 0 })
	if all[0].Record.Domain != uuid {
		t.Errorf("%+v", all)
	}
}

// The record is on the disk before it gets its number, and the number before
// the daemon is told.
func TestRecordsAreDurable(t *testing.T) {
	directory, log := t.TempDir(), t.TempDir()+"/log"
	c := hookCommand(t, directory, bustest.Start(t), "web", "start", "begin", "-")
	traced := exec.Command("strace", append([]string{"-f", "-y", "-o", log, "-e", "trace=fsync,linkat,connect", program}, c.Args[1:]...)...)
	traced.Env, traced.Stdin = append(c.Env, "PATH="+os.Getenv("PATH")), strings.NewReader(fmt.Sprintf(definition, ""))
	if out, err := traced.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	eventually(t, func() ([]spool.Entry, bool) { all := entries(t, directory); return all, len(all) > 0 })
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	at := 0
	for _, step := range []string{"fsync(", "/.new-", "linkat(", ".json", "fsync(", directory + ">", "connect("} {
		i := strings.Index(string(text[at:]), step)
		if i < 0 {
			t.Fatalf("no %s in its place:\n%s", step, text)
		}
		at += i
	}
}

// hung is a file system on which looking at one file waits until the test ends.
type hung struct {
	fs.LoopbackNode
	wait    chan struct{}
	reached chan struct{}
	once    sync.Once
}

func (h *hung) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if strings.HasPrefix(name, "hung") {
		h.once.Do(func() { close(h.reached) })
		<-h.wait
	}
	return h.LoopbackNode.Lookup(ctx, name, out)
}

func mountHung(t *testing.T) (*hung, string) {
	t.Helper()
	point, below := t.TempDir(), t.TempDir()
	var st syscall.Stat_t
	if err := syscall.Stat(below, &st); err != nil {
		t.Fatal(err)
	}
	h := &hung{wait: make(chan struct{}), reached: make(chan struct{})}
	h.RootData = &fs.LoopbackRoot{Path: below, Dev: st.Dev, RootNode: h}
	server, err := fs.Mount(point, h, &fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "hung"}})
	if err != nil {
		t.Skipf("FUSE is not to be had here: %v", err)
	}
	t.Cleanup(func() {
		eventually(t, func() (bool, bool) { return true, server.Unmount() == nil })
	})
	return h, point
}

// A share hangs in a way that SIGKILL does not end. libvirt is let go; the
// other disks are seen, and the record is written.
func TestStorageThatHangs(t *testing.T) {
	h, share := mountHung(t)
	letGo := sync.OnceFunc(func() { close(h.wait) })
	t.Cleanup(letGo)
	directory, disk := t.TempDir(), t.TempDir()+"/disk"
	for _, line := range []string{"qemu-img create -q -f qcow2 -u -b " + share + "/hung-base -F raw " + disk + " 1M", "cp " + disk + " " + disk + "2"} {
		args := strings.Fields(line)
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", line, err, out)
		}
	}
	xml := fmt.Sprintf(definition, diskXML("vda", "qcow2", disk)+diskXML("vdb", "raw", disk+"2")+diskXML("vdc", "raw", share+"/hung-disk"))
	callHook(t, directory, bustest.Start(t), xml, "web", "release", "end", "-")
	<-h.reached
	all := eventually(t, func() ([]spool.Entry, bool) { all := entries(t, directory); return all, len(all) > 0 })
	var got []string
	for _, d := range all[0].Record.Disks {
		for _, l := range d.Layers {
			got = append(got, d.Target+" "+string(l.Kind)+" "+filepath.Base(l.Path))
		}
	}
	want := []string{"vda file disk", "vda unreadable hung-base", "vdb file disk2", "vdc unreadable hung-disk"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// The disk under the spool hangs: libvirt is let go, and the record is written
// when the disk is back.
func TestSpoolThatHangs(t *testing.T) {
	h, share := mountHung(t)
	letGo := sync.OnceFunc(func() { close(h.wait) })
	t.Cleanup(letGo)
	directory := share + "/hung-spool"
	callHook(t, directory, bustest.Start(t), fmt.Sprintf(definition, ""), "web", "start", "begin", "-")
	<-h.reached
	letGo()
	all := eventually(t, func() ([]spool.Entry, bool) { all := entries(t, directory); return all, len(all) > 0 })
	if len(all) != 1 || all[0].Err != nil || all[0].Record.Domain != uuid {
		t.Errorf("%+v", all)
	}
}

// A bus that is there and does not answer.
func TestBusThatHangs(t *testing.T) {
	directory := t.TempDir()
	socket := filepath.Join(t.TempDir(), "bus")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: socket}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 1); err != nil {
		t.Fatal(err)
	}
	for range 5 { // more than the socket lets in
		callHook(t, directory, "unix:path="+socket, fmt.Sprintf(definition, ""), "web", "start", "begin", "-")
	}
	eventually(t, func() (bool, bool) { return true, len(entries(t, directory)) == 5 })
}
