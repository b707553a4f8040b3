package journal

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const catalogFile = "virtbackup.catalog"

// entries reads a catalog: the text of each message.
func entries(t *testing.T, path string) map[Message]string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	all := map[Message]string{}
	var id Message
	for line := range strings.Lines(string(text)) {
		if of, ok := strings.CutPrefix(line, "-- "); ok {
			id = Message(strings.TrimSpace(of))
			if _, again := all[id]; again {
				t.Errorf("%s is explained twice", id)
			}
			all[id] = ""
		} else if id != "" {
			all[id] += line
		}
	}
	return all
}

func TestEveryMessageIsExplained(t *testing.T) {
	explained := entries(t, catalogFile)
	if got, want := slices.Sorted(maps.Keys(explained)), slices.Sorted(slices.Values(Messages())); !slices.Equal(got, want) {
		t.Errorf("the catalog has %v, the messages are %v", got, want)
	}
	id := regexp.MustCompile(`^[0-9a-f]{32}$`)
	head := regexp.MustCompile(`^Subject: \S.*\nDefined-By: virtbackup\nSupport: https://\S+\nDocumentation: man:[a-z.]+\([158]\)\n\n\S`)
	for m, text := range explained {
		if !id.MatchString(string(m)) {
			t.Errorf("%q is no id", m)
		}
		if !head.MatchString(text) {
			t.Errorf("%s: %s", m, text)
		}
		for _, field := range regexp.MustCompile(`@[^@\n]*@`).FindAllString(text, -1) {
			if !strings.HasPrefix(field, "@"+fieldPrefix) {
				t.Errorf("%s: %s is no field of ours", m, field)
			}
		}
	}
}

func TestMessagesAreAll(t *testing.T) {
	messages, err := os.ReadFile("messages.go")
	if err != nil {
		t.Fatal(err)
	}
	declared := regexp.MustCompile(`(?m)^\t(\w+)\s+Message = "`).FindAllSubmatch(messages, -1)
	if len(declared) != len(Messages()) {
		t.Errorf("%d messages are declared, and Messages has %d", len(declared), len(Messages()))
	}
}
