package config

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const manPage = "../../virtbackupd.toml.5"

var update = flag.Bool("update", false, "write the manual page anew")

// TestManPage keeps the manual page in step with the settings. Run it with
// -update to write the page anew.
func TestManPage(t *testing.T) {
	want := renderManPage()
	if *update {
		if err := os.WriteFile(manPage, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(manPage)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("the page differs, run the test with -update:\n%s", diff)
	}
}

func renderManPage() string {
	var b strings.Builder
	b.WriteString(`.\" Made from daemon/internal/config by "go test -update": change it there.
.TH VIRTBACKUPD.TOML 5 "" "virtbackup" "virtbackup"
.SH NAME
virtbackupd.toml \- settings of virtbackupd
.SH SYNOPSIS
` + roff(DefaultPath) + `
.SH DESCRIPTION
The file is TOML.
A setting that is left out has its default, and so have all if there is no file.
An unknown setting or a value that is not allowed is refused with its line, and the daemon does not start, or goes on with the settings it had.
.PP
.B virtbackupctl config show
prints the settings that are in effect and where each is from.
`)
	section := ""
	for _, s := range Default().settings() {
		of, name, _ := strings.Cut(s.key, ".")
		if of != section {
			section = of
			fmt.Fprintf(&b, ".SH SECTION [%s]\n", strings.ToUpper(section))
		}
		fmt.Fprintf(&b, ".TP\n.BR %s \" = \" %s\n%s\nAllowed: %s.\nThe default is shown.\n", name, quoteArgument(s.get()), roff(s.help), roff(s.allowed))
	}
	b.WriteString(".SH SEE ALSO\n.BR virtbackupctl (1),\n.BR systemd.resource\\-control (5)\n")
	return b.String()
}

func roff(s string) string {
	return strings.NewReplacer(`\`, `\e`, "-", `\-`, `"`, `\(dq`).Replace(s)
}

func quoteArgument(s string) string { return `"` + roff(s) + `"` }
