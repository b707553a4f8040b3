package dbus

import (
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strconv"
	"testing"
)

// chainCauses returns the causes that the daemon can give, from its source:
// nothing may import its package.
func chainCauses(t *testing.T) []string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "../daemon/internal/chain/words.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if typ, ok := spec.Type.(*ast.Ident); !ok || typ.Name != "Cause" {
			return false
		}
		for _, v := range spec.Values {
			text, err := strconv.Unquote(v.(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, text)
		}
		return false
	})
	if len(all) < 20 {
		t.Fatalf("%d causes were found in the source", len(all))
	}
	return all
}

func TestEveryCauseHasAText(t *testing.T) {
	daemon := chainCauses(t)
	for _, c := range daemon {
		if CauseText(c) == c {
			t.Errorf("people are not told what %q means: see causes", c)
		}
	}
	for _, known := range causes() {
		if !slices.Contains(daemon, known.word) {
			t.Errorf("%q has a text, and the daemon does not give it", known.word)
		}
	}
	if got := CauseText("of-the-future"); got != "of-the-future" {
		t.Errorf("a cause that is not known says %q", got)
	}
}
