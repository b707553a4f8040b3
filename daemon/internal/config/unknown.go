package config

import (
	"fmt"
	"strings"

	"github.com/BurntSushi/toml"
)

// unknown says that there is no such key, and which one may have been meant.
func unknown(key toml.Key, all []setting) error {
	name := key.String()
	best, least := "", len(name)/2+1 // farther away is no suggestion
	consider := func(candidate string, distance int) {
		if distance < least {
			best, least = candidate, distance
		}
	}
	for _, s := range all {
		section, last, _ := strings.Cut(s.key, ".")
		if len(key) == 1 {
			consider("["+section+"]", distance(name, section))
		}
		// The right name in the wrong section is as near as one letter.
		if key[len(key)-1] == last {
			consider(s.key, 1)
		}
		consider(s.key, distance(name, s.key))
	}
	if best == "" {
		return fmt.Errorf("unknown setting %q", name)
	}
	return fmt.Errorf("unknown setting %q; did you mean %q?", name, best)
}

// distance returns how many letters have to be changed, added or taken away to
// make one word of the other (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		before := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := before
			if a[i] != b[j] {
				change++
			}
			before = row[j+1]
			row[j+1] = min(change, row[j+1]+1, row[j]+1)
		}
	}
	return row[len(b)]
}
