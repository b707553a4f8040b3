package step

import (
	"bytes"
	"strings"
	"unicode"
	"unicode/utf8"
)

// mostShown is how much of what a guest said is kept as evidence, in bytes.
const mostShown = 8 << 10

// printable returns what a guest said as text of bounded length without what
// would steer a terminal. The end of it is kept: there the errors are.
func printable(text string) string {
	text = strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || !unicode.IsControl(r) {
			return r
		}
		if r == '\r' {
			return -1
		}
		return utf8.RuneError
	}, strings.ToValidUTF8(text, string(utf8.RuneError)))
	if len(text) > mostShown {
		return "(the beginning is cut off)\n" + strings.ToValidUTF8(text[len(text)-mostShown:], "")
	}
	return text
}

// said is all that a program wrote, for people.
func said(o Output) string {
	text := string(o.Stdout)
	if len(o.Stderr) > 0 {
		if text != "" && !strings.HasSuffix(text, "\n") {
			text += "\n"
		}
		text += string(o.Stderr)
	}
	return text
}

// same compares what a program wrote with what it must, without the ends of
// the last lines.
func same(got, want []byte) bool {
	trim := func(b []byte) []byte { return bytes.TrimRight(b, "\r\n") }
	return bytes.Equal(trim(got), trim(want))
}
