// virtbackup-hook is what libvirt runs with each step of each domain
// (https://libvirt.org/hooks.html). It writes down what it sees, and wakes
// virtbackupd; libvirt, and with it the guest, waits for it meanwhile.
//
// It is two processes. The one that libvirt started touches nothing that can
// hang, and is gone within the limit, with exit status 0: libvirt does not
// start a domain, and kills one that runs, when a hook fails. The other one, the
// recorder, does the work. When storage hangs, that one hangs, in a way that
// not even SIGKILL may end; and when the storage comes back, it still writes
// down what happened.
package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/hooks/spool"
)

const (
	// limit is how long libvirt waits: 1 s, less what starting and ending
	// processes takes on a busy host.
	limit = 900 * time.Millisecond
	// recorderName is argv[0] of the recorder. libvirt calls the hook by its path.
	recorderName = "virtbackup-hook: recorder"
	// maxXML bounds the definition of a domain, in bytes.
	maxXML = 16 << 20
	// maxComplaint bounds what is passed on of the recorder's stderr, in bytes.
	maxComplaint = 4 << 10
)

func main() {
	if os.Args[0] == recorderName {
		recorder(os.Args)
	} else {
		hook(os.Args, spool.Directory)
	}
}

// hook runs the recorder and waits for it, for no longer than the limit. It
// does not return.
func hook(args []string, directory string) {
	defer os.Exit(0) // also in a panic
	time.AfterFunc(limit, func() { os.Exit(0) })
	// Nobody listens any more, or wants it to end: it will anyway.
	signal.Ignore(syscall.SIGPIPE, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	if len(args) < 3 {
		fmt.Fprintln(os.Stderr, "virtbackup-hook: libvirt calls this program, with the name of a domain and an operation")
		return
	}
	parent := os.Getppid()
	// Another one's id is all that is left of one that is gone.
	libvirt := cmp.Or(spool.Process(parent), fmt.Sprintf("%d@", parent))
	call := call{directory: directory, libvirt: libvirt, deadline: monotonic() + limit, args: args[1:]}
	c := exec.Command("/proc/self/exe")
	c.Args = call.encode()
	c.Dir = "/"
	// Not one of libvirt's own streams: it waits until nobody has them open.
	c.Stdin = io.LimitReader(os.Stdin, maxXML+1)
	c.Stderr = &limitedWriter{os.Stderr, maxComplaint}
	// Not to get the signals of somebody's terminal or of a group.
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "virtbackup-hook: cannot record what happened:", err)
	}
}

// call is what the hook tells the recorder.
type call struct {
	directory string
	libvirt   string        // as spool.Record.Libvirt
	deadline  time.Duration // of the monotonic clock: libvirt waits until then
	args      []string      // domain, operation, sub-operation, extra
}

func (c call) encode() []string {
	return append([]string{recorderName, c.directory, c.libvirt, strconv.FormatInt(int64(c.deadline), 10)}, c.args...)
}

func decode(args []string) (call, error) {
	if len(args) < 6 {
		return call{}, fmt.Errorf("the recorder is told %d things only", len(args))
	}
	deadline, err := strconv.ParseInt(args[3], 10, 64)
	return call{directory: args[1], libvirt: args[2], deadline: time.Duration(deadline), args: args[4:]}, err
}

// arg is an argument that libvirt gave; empty when it gave none.
func (c call) arg(i int) string {
	if i < len(c.args) {
		return c.args[i]
	}
	return ""
}

// monotonic is the time of a clock that is the same for all processes, and
// that nobody sets.
func monotonic() time.Duration {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // always there on Linux
	return time.Duration(now.Nano())
}

// limitedWriter passes on what comes first, and takes all.
type limitedWriter struct {
	w    io.Writer
	left int
}

func (l *limitedWriter) Write(p []byte) (int, error) {
	n := min(len(p), l.left)
	l.left -= n
	_, _ = l.w.Write(p[:n]) // nobody may be there to read it
	return len(p), nil
}
