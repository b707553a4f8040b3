package step

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ParsePorts reads TCP ports, as settings have them.
func ParsePorts(texts []string) ([]uint16, error) {
	var ports []uint16
	for _, text := range texts {
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || n == 0 {
			return nil, fmt.Errorf("%q is not a TCP port from 1 to 65535", text)
		}
		ports = append(ports, uint16(n))
	}
	return ports, nil
}

// lookEvery is how long to wait for a service to come up.
const lookEvery = 2 * time.Second

// ports looks whether somebody listens at TCP ports in the guest, by its
// kernel's list. Services may begin after the agent.
type ports struct {
	ports   []uint16
	timeout time.Duration
}

func (ports) Name() string { return NamePorts }

func (p ports) Run(ctx context.Context, g Guest, _ []Finding) Finding {
	if len(p.ports) == 0 {
		return Finding{Verdict: Skipped, Cause: "no validation port is set"}
	}
	within, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	system, err := systemOf(within, g)
	for err == nil {
		var open []uint16
		if open, err = listening(within, g, system); err != nil {
			break
		}
		missing := without(p.ports, open)
		if len(missing) == 0 {
			return Finding{Verdict: Valid}
		}
		select {
		case <-within.Done():
			return Finding{Verdict: NotValid, Cause: fmt.Sprintf("nobody listens at port %s in the guest", list(missing)), Output: "Ports with listeners: " + list(open)}
		case <-time.After(lookEvery):
		}
	}
	if within.Err() != nil {
		return Finding{Verdict: NotValid, Cause: fmt.Sprintf("the guest did not tell within %s at which ports somebody listens", p.timeout)}
	}
	return failed(err)
}

// without returns the ports that are not among others.
func without(all, others []uint16) []uint16 {
	return slices.DeleteFunc(slices.Clone(all), func(p uint16) bool { return slices.Contains(others, p) })
}

func list(ports []uint16) string {
	texts := make([]string, len(ports))
	for i, p := range ports {
		texts[i] = strconv.Itoa(int(p))
	}
	return strings.Join(texts, ", ")
}

// systemOf asks for the guest's system; "" of an agent that cannot tell.
func systemOf(ctx context.Context, g Guest) (string, error) {
	system, err := g.System(ctx)
	if errors.Is(err, ErrRefused) {
		return "", nil
	}
	return system, err
}

// windows is what guest-get-osinfo calls all of them.
const windows = "mswindows"

// listening returns the TCP ports that somebody listens at.
func listening(ctx context.Context, g Guest, system string) ([]uint16, error) {
	if system == windows {
		o, err := g.Execute(ctx, powershell("Get-NetTCPConnection -State Listen | ForEach-Object { $_.LocalPort }"))
		return parseNumbers(o.Stdout), err
	}
	// The lines of those that listen alone: the file may be long.
	o, err := g.Execute(ctx, Command{Path: "grep", Arguments: []string{"-h", " 0A ", "/proc/net/tcp", "/proc/net/tcp6"}})
	if errors.Is(err, ErrRefused) {
		o, err = g.Execute(ctx, Command{Path: "cat", Arguments: []string{"/proc/net/tcp", "/proc/net/tcp6"}})
	}
	return parseProcNetTCP(o.Stdout), err
}

// powershell is a command of Windows.
func powershell(script string) Command {
	return Command{Path: "powershell.exe", Arguments: []string{"-NoProfile", "-NonInteractive", "-Command", script}}
}

func parseNumbers(text []byte) []uint16 {
	var all []uint16
	for _, word := range strings.Fields(string(text)) {
		if n, err := strconv.ParseUint(word, 10, 16); err == nil && !slices.Contains(all, uint16(n)) {
			all = append(all, uint16(n))
		}
	}
	slices.Sort(all)
	return all
}

// parseProcNetTCP reads /proc/net/tcp and tcp6: number, local address and port
// in hexadecimal, remote ones, state, of which 0A is that of a listener.
func parseProcNetTCP(text []byte) []uint16 {
	const listen = "0A"
	var all []uint16
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 4 || fields[3] != listen {
			continue
		}
		_, digits, _ := strings.Cut(fields[1], ":")
		if b, err := hex.DecodeString(digits); err == nil && len(b) == 2 && !slices.Contains(all, binary.BigEndian.Uint16(b)) {
			all = append(all, binary.BigEndian.Uint16(b))
		}
	}
	slices.Sort(all)
	return all
}
