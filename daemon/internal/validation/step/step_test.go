package step

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"pgregory.net/rapid"

	"github.com/virtbackup/virtbackup/daemon/internal/validation/screen"
)

// guest is one whose answers are given.
type guest struct {
	ping     func(n int) error // of the nth time, from 0
	system   string
	run      func(Command) (Output, error)
	screen   string // a file of package screen's tests
	noScreen error
	impeded  error

	pings int
	ran   []string
}

func (g *guest) Ping(ctx context.Context) error {
	g.pings++
	if g.ping == nil {
		return nil
	}
	return g.ping(g.pings - 1)
}

func (g *guest) System(context.Context) (string, error) { return g.system, nil }

func (g *guest) Execute(ctx context.Context, c Command) (Output, error) {
	g.ran = append(g.ran, strings.Join(append([]string{c.Path}, c.Arguments...), " "))
	if g.run == nil {
		<-ctx.Done()
		return Output{}, ctx.Err()
	}
	return g.run(c)
}

func (g *guest) Screenshot(context.Context) ([]byte, error) {
	if g.noScreen != nil || g.screen == "" {
		return nil, g.noScreen
	}
	return os.ReadFile("../screen/testdata/" + g.screen)
}

func (g *guest) Impeded(context.Context) error { return g.impeded }

var settings = Settings{BootTimeout: 30 * time.Second, CommandTimeout: 10 * time.Second, ScreenshotWait: 60 * time.Second,
	Command: "/bin/cat", Arguments: []string{"/hello"}, Expected: []byte("hello"), Ports: []uint16{22}}

// wrote is a guest's run that writes the same whatever is run.
func wrote(text string) func(Command) (Output, error) {
	return func(Command) (Output, error) { return Output{Stdout: []byte(text)}, nil }
}

func never(err error) func(int) error { return func(int) error { return err } }

func TestVerdicts(t *testing.T) {
	agentless := never(fmt.Errorf("cannot ping: %w", ErrNoAgent))
	for _, test := range []struct {
		name    string
		steps   []string
		guest   guest
		verdict Verdict
		step    string
		cause   string
		shot    bool
	}{
		{"good", []string{NameBoot, NameCommand}, guest{run: wrote("hello\n")}, Valid, "", "", false},
		{"good, by default", nil, guest{screen: "up.png"}, Valid, "", "", true},
		{"late agent", []string{NameBoot}, guest{ping: func(n int) error {
			if n < 5 {
				return ErrSilent
			}
			return nil
		}}, Valid, "", "", false},
		{"silent agent", []string{NameBoot, NameCommand}, guest{ping: never(ErrSilent), screen: "panic.png"}, NotValid, NameBoot, "the guest agent did not answer within 30s", true},
		{"silent agent, by default", nil, guest{ping: never(ErrSilent), screen: "up.png"}, NotValid, NameBoot, "the guest agent did not answer within 30s", true},
		{"silent agent, panic", nil, guest{ping: never(ErrSilent), screen: "panic.png"}, NotValid, NameBoot, "the guest agent does not answer, and the screen says that the kernel panicked", true},
		{"silent agent, panic, and a hung repository", nil, guest{ping: never(ErrSilent), screen: "panic.png", impeded: errors.New("x")}, Unable, NameBoot, "the host kept the guest from going on: x", true},
		{"silent agent, and a hung repository", []string{NameBoot}, guest{ping: never(ErrSilent), impeded: errors.New("repository nas does not answer")}, Unable, NameBoot,
			"the host kept the guest from going on: repository nas does not answer", false},
		{"guest that powers off", []string{NameBoot}, guest{ping: never(ErrEnded)}, NotValid, NameBoot, "the guest ended", false},
		{"killed QEMU", []string{NameBoot}, guest{ping: never(ErrEnded), impeded: errors.New("QEMU was killed")}, Unable, NameBoot, "the host kept the guest from going on: QEMU was killed", false},
		{"libvirt that is away", []string{NameBoot}, guest{ping: never(errors.New("cannot ask libvirt"))}, Unable, NameBoot, "cannot ask libvirt", false},
		{"no agent, good screen", nil, guest{ping: agentless, screen: "up.png"}, Valid, "", "", true},
		{"no agent, panic", nil, guest{ping: agentless, screen: "panic.png"}, NotValid, NameJudge, "the screen says that the kernel panicked", true},
		{"no agent, no disk", nil, guest{ping: agentless, screen: "bios-nodisk.png"}, NotValid, NameJudge, "the screen says that the firmware found nothing to start", true},
		{"no agent, blank", nil, guest{ping: agentless, screen: "paused.png"}, NotValid, NameJudge, "the screen is blank", true},
		{"agent, blank", nil, guest{screen: "paused.png"}, Valid, "", "", true},
		{"agent, no screen", nil, guest{noScreen: ErrNoScreen}, Valid, "", "", false},
		{"no agent, no screen", nil, guest{ping: agentless, noScreen: ErrNoScreen}, Unable, NameJudge, "no step could be done: the domain has no screen", false},
		{"no agent, command only", []string{NameCommand}, guest{run: func(Command) (Output, error) { return Output{}, ErrNoAgent }}, Unable, NameCommand, "no step could be done: the domain has no guest agent", false},
		{"screenshot that fails", []string{NameScreenshot}, guest{noScreen: errors.New("cannot take a screenshot")}, Unable, NameScreenshot, "cannot take a screenshot", false},
		{"judged alone", []string{NameJudge}, guest{screen: "ovmf.png"}, NotValid, NameJudge, "the screen says that it ended in the shell of the firmware", true},
		{"other output", []string{NameCommand}, guest{run: wrote("hallo"), screen: "up.png"}, NotValid, NameCommand, `"/bin/cat" wrote something else than is expected`, true},
		{"output without end", []string{NameCommand}, guest{run: func(Command) (Output, error) { return Output{Stdout: []byte("hello, hello"), Truncated: true}, nil }},
			NotValid, NameCommand, `"/bin/cat" wrote more than the 65536 bytes that are compared`, false},
		{"no such command", []string{NameCommand}, guest{run: func(Command) (Output, error) {
			return Output{}, fmt.Errorf("%w: Failed to execute child process \"/bin/cat\" (No such file or directory)", ErrRefused)
		}}, NotValid, NameCommand, `"/bin/cat" cannot be run in the guest`, false},
		{"commands that the agent must not run", []string{NameCommand}, guest{run: func(Command) (Output, error) {
			return Output{}, fmt.Errorf("%w: Command guest-exec has been disabled", ErrRefused)
		}}, Unable, NameCommand, "the guest agent refused: Command guest-exec has been disabled", false},
		{"command that hangs", []string{NameCommand}, guest{}, NotValid, NameCommand, `"/bin/cat" did not end within 10s`, false},
		{"command that hangs with the host", []string{NameCommand}, guest{impeded: errors.New("x")}, Unable, NameCommand, "the host kept the guest from going on: x", false},
		{"open port", []string{NamePorts}, guest{run: wrote("   0: 00000000:0016 00000000:0000 0A 00000000:00000000")}, Valid, "", "", false},
		{"closed port", []string{NamePorts}, guest{run: wrote("   0: 00000000:0050 00000000:0000 0A\n   1: 00000000:0016 01020304:0016 01\n")}, NotValid, NamePorts, "nobody listens at port 22 in the guest", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				steps, err := New(test.steps, settings, time.Now())
				if err != nil {
					t.Fatal(err)
				}
				r, err := Run(t.Context(), &test.guest, steps, func(string) {})
				if err != nil {
					t.Fatal(err)
				}
				if r.Verdict != test.verdict || r.Step != test.step || !strings.HasPrefix(r.Cause, test.cause) || (r.Cause == "") != (test.cause == "") {
					t.Errorf("%s, by %q: %s\n%+v", r.Verdict, r.Step, r.Cause, r.Findings)
				}
				if (r.Screenshot != nil) != test.shot {
					t.Errorf("a screenshot of %d bytes", len(r.Screenshot))
				}
			})
		})
	}
}

// TestFirmwareAloneSaysNothing has a screen end with the firmware's word.
func TestFirmwareAloneSaysNothing(t *testing.T) {
	for _, test := range []struct {
		lines  []string
		booted bool
		want   Verdict
	}{
		{[]string{"Booting from Hard Disk..."}, false, Unable},
		{[]string{"Booting from Hard Disk..."}, true, Valid}, // its console is elsewhere
		{[]string{"Booting from Hard Disk...", "virtbackup: this disk is up"}, false, Valid},
		{[]string{"Booting from Hard Disk...", "Boot failed: not a bootable disk", "", "No bootable device."}, false, NotValid},
		{[]string{"No bootable device.", "Booting from Floppy..."}, false, NotValid},
	} {
		f := judged(screen.JudgeText(test.lines), test.booted)
		if f.Verdict != test.want || (f.Cause == "") != (test.want == Valid) {
			t.Errorf("%q, booted %v: %+v", test.lines, test.booted, f)
		}
	}
}

func TestExitCodeCountsWhereNoOutputIsExpected(t *testing.T) {
	for cause, o := range map[string]Output{"": {Stdout: []byte("x")}, `"c" ended with exit code 3`: {ExitCode: 3}, `"c" was ended by signal 9`: {ExitCode: 9, Signalled: true}} {
		if f := (command{Command: Command{Path: "c"}}).judge(o); f.Cause != cause || (f.Verdict == Valid) != (cause == "") {
			t.Errorf("%+v: %+v", o, f)
		}
	}
	if f := (command{Command: Command{Path: "c"}, expected: []byte{}}).judge(Output{Stdout: []byte("x")}); f.Verdict != NotValid {
		t.Error("nothing is expected, and something was written")
	}
}

// TestPanicIsNotWaitedFor has the screen tell that nobody will answer any more.
func TestPanicIsNotWaitedFor(t *testing.T) {
	for file, want := range map[string]time.Duration{"panic.png": 22 * time.Second, "up.png": time.Minute, "paused.png": time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			start, g := time.Now(), &guest{ping: never(ErrSilent), screen: file}
			f := boot{time.Minute, true}.Run(t.Context(), g, nil)
			if took := time.Since(start); f.Verdict != NotValid || took > want || took < want/2 {
				t.Errorf("%s: %s after %s: %s", file, f.Verdict, took, f.Cause)
			}
		})
	}
}

func TestScreenshotWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		steps, err := New([]string{NameScreenshot, NameJudge}, settings, start.Add(-20*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		r, err := Run(t.Context(), &guest{screen: "up.png"}, steps, func(string) {})
		if waited := time.Since(start); err != nil || waited != 40*time.Second || r.Findings[0].Took != waited {
			t.Errorf("waited %s, %v", waited, err)
		}
	})
}

func TestCancelledRunDecidesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		because := errors.New("because")
		for after := time.Duration(0); after < 50*time.Second; after += 7 * time.Second {
			ctx, cancel := context.WithCancelCause(t.Context())
			time.AfterFunc(after, func() { cancel(because) })
			steps, err := New(Names(), settings, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			r, err := Run(ctx, &guest{ping: never(ErrSilent), screen: "up.png"}, steps, func(string) {})
			if !errors.Is(err, because) || r.Verdict != "" {
				t.Errorf("after %s: %v, %+v", after, err, r)
			}
		}
	})
}

func TestFilesystems(t *testing.T) {
	const mounts = "/dev/vda1 / ext4 rw 0 0\nproc /proc proc rw 0 0\n/dev/sr0 /media iso9660 ro 0 0\n/dev/vdb /srv/my\\040data xfs rw 0 0\n"
	good := map[string]Output{
		"dmesg":            {Stdout: []byte("[ 1.0] EXT4-fs (vda1): recovery complete\n[ 1.1] EXT4-fs (vda1): mounted filesystem\n[ 2.0] blk_update_request: I/O error, dev fd0, sector 0\n")},
		"cat /proc/mounts": {Stdout: []byte(mounts)}, "cat /sys/fs/ext4/vda1/errors_count": {Stdout: []byte("0\n")},
		"find / /srv/my data -xdev -name .virtbackup-reads-directories": {},
	}
	for _, test := range []struct {
		name    string
		changed map[string]Output
		gone    []string
		verdict Verdict
		cause   string
	}{
		{"good", nil, nil, Valid, ""},
		{"errors in the log", map[string]Output{"dmesg": {Stdout: []byte("[ 3.0] EXT4-fs error (device vda1): ext4_lookup:1785: inode #2: comm ls: iget: checksum invalid\n")}}, nil, NotValid, "checksum invalid"},
		{"an unreadable disk", map[string]Output{"dmesg": {Stdout: []byte("[ 3.0] I/O error, dev vda, sector 2048 op 0x0:(READ)\n")}}, nil, NotValid, "I/O error, dev vda"},
		{"errors that were counted", map[string]Output{"cat /sys/fs/ext4/vda1/errors_count": {Stdout: []byte("4\n")}}, nil, NotValid, "/dev/vda1 has counted 4 errors"},
		{"unreadable directory", map[string]Output{"find / /srv/my data -xdev -name .virtbackup-reads-directories": {ExitCode: 1, Stderr: []byte("find: /srv: Structure needs cleaning\n")}}, nil, NotValid, "Structure needs cleaning"},
		{"directory that is nobody's business", map[string]Output{"find / /srv/my data -xdev -name .virtbackup-reads-directories": {ExitCode: 1, Stderr: []byte("find: /x: Permission denied\n")}}, nil, Valid, ""},
		{"no dmesg", nil, []string{"dmesg"}, Valid, ""},
		{"no tools", nil, []string{"dmesg", "cat", "find"}, Unable, "the guest has nothing to look at its file systems with"},
		{"no disk that is mounted", map[string]Output{"cat /proc/mounts": {Stdout: []byte("proc /proc proc rw 0 0\n")}}, []string{"dmesg"}, Unable, "no file system of a disk is mounted"},
	} {
		g := &guest{run: func(c Command) (Output, error) {
			line := strings.Join(append([]string{c.Path}, c.Arguments...), " ")
			if slices.Contains(test.gone, c.Path) {
				return Output{}, fmt.Errorf("%w: Failed to execute child process", ErrRefused)
			}
			if o, ok := test.changed[line]; ok {
				return o, nil
			}
			o, ok := good[line]
			if !ok {
				t.Errorf("%s: it ran %q", test.name, line)
			}
			return o, nil
		}}
		f := filesystems{time.Second}.Run(t.Context(), g, nil)
		if f.Verdict != test.verdict || !strings.Contains(f.Cause, test.cause) {
			t.Errorf("%s: %+v", test.name, f)
		}
	}
	wins := map[string]int{"": 100, "Windows tells of volumes that are not healthy": 102, "the guest has nothing": 1}
	for cause, code := range wins {
		g := &guest{system: windows, run: func(Command) (Output, error) { return Output{ExitCode: code}, nil }}
		if f := (filesystems{time.Second}).Run(t.Context(), g, nil); !strings.HasPrefix(f.Cause, cause) || (f.Verdict == Valid) != (code == 100) {
			t.Errorf("Windows, %d: %+v", code, f)
		}
	}
}

func TestWalkThatTakesLongIsNoFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &guest{}
		g.run = func(c Command) (Output, error) {
			switch c.Path {
			case "cat":
				return Output{Stdout: []byte("/dev/vda / xfs rw 0 0\n")}, nil
			case "find":
				time.Sleep(6 * time.Second)
				return Output{}, ErrSilent
			}
			return Output{}, nil
		}
		if f := (filesystems{5 * time.Second}).Run(t.Context(), g, nil); f.Verdict != Valid || !strings.Contains(f.Output, "not read to the end") {
			t.Errorf("%+v", f)
		}
	})
}

func TestPorts(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue
   0: 0100007F:0CEA 00000000:0000 0A 00000000:00000000 00:00000000 00000000   106        0 20349 1
   1: 00000000:0016 00000000:0000 0A 00000000:00000000
   2: 0A00020F:0016 0A000202:CA32 01 00000000:00000000
  sl  local_address                         remote_address                        st
   0: 00000000000000000000000000000000:0016 00000000000000000000000000000000:0000 0A
   1: broken
   2: x:zz y:0000 0A
`
	if got := parseProcNetTCP([]byte(table)); !slices.Equal(got, []uint16{22, 3306}) {
		t.Error(got)
	}
	if got := parseNumbers([]byte("443\r\n80\r\n80\r\nx\r\n70000\r\n")); !slices.Equal(got, []uint16{80, 443}) {
		t.Error(got)
	}
	for _, bad := range []string{"0", "65536", "-1", "ssh", ""} {
		if _, err := ParsePorts([]string{bad}); err == nil {
			t.Errorf("%q is a port", bad)
		}
	}
}

// TestWhatAGuestSaysIsBounded has a guest say anything.
func TestWhatAGuestSaysIsBounded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := printable(string(rapid.SliceOfN(rapid.Byte(), 0, 100).Draw(t, "bytes")))
		for _, r := range text {
			if unicode.IsControl(r) && r != '\n' && r != '\t' {
				t.Fatalf("%q", text)
			}
		}
	})
	if got := printable(strings.Repeat("ä", mostShown)); len(got) > mostShown+100 {
		t.Errorf("%d bytes are kept", len(got))
	}
}

func TestUnknownStepIsRefused(t *testing.T) {
	if _, err := New([]string{NameBoot, "rm"}, settings, time.Now()); err == nil {
		t.Error("it was taken")
	}
	for _, name := range Names() {
		steps, err := New([]string{name}, settings, time.Now())
		if err != nil || len(steps) != 1 || steps[0].Name() != name {
			t.Errorf("%s: %v, %v", name, steps, err)
		}
	}
}
