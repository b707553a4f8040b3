package step

import (
	"fmt"
	"strconv"
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
