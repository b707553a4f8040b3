package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/virtbackup/virtbackup/dbus"
)

// validationSteps are what there is to say for --validation-steps.
func validationSteps() []string {
	return []string{"wait_for_boot", "check_filesystems", "execute_command", "check_port", "screenshot", "judge_screen"}
}

// addValidation adds the flags of how backups are tried.
func addValidation(cmd *cobra.Command, v *dbus.Validation) {
	text := func(text string) (string, error) { return text, nil }
	addTruth(cmd, &v.Validate, "validate", "try backups, by starting them")
	addWords(cmd, &v.ValidationSteps, "validation-steps", "how: "+strings.Join(validationSteps(), ", ")+"; \"\" for wait_for_boot,screenshot,judge_screen", validationSteps()...)
	addNumber(cmd, &v.ValidationBootTimeout, "validation-boot-timeout", "seconds that the guest agent may take to answer; 0, as of the other times, for what the configuration says")
	cmd.Flags().Var(optional[string]{&v.ValidationCommand, text, "PATH"}, "validation-command", "run this program in the guest; \"\" for none")
	cmd.Flags().Var(repeated{&v.ValidationArguments}, "validation-argument", "with this argument; may be given several times, \"\" alone for none")
	cmd.Flags().Var(optional[string]{&v.ValidationExpected, text, "BASE64"}, "validation-expected", "it must write this, in base64; \"\": its exit code must be 0")
	addNumber(cmd, &v.ValidationCommandTimeout, "validation-command-timeout", "seconds that it may take")
	addNumber(cmd, &v.ValidationScreenshotWait, "validation-screenshot-wait", "seconds after the start when the screenshot is taken")
	addWords(cmd, &v.ValidationPorts, "validation-ports", "TCP ports that somebody must listen at in the guest, as 22,80")
	for _, name := range []string{"validation-command", "validation-argument", "validation-expected"} {
		complete(cmd, name, cobra.NoFileCompletions)
	}
}

func (a *app) validateCommand() *cobra.Command {
	var o dbus.ValidateOptions
	cmd := &cobra.Command{
		Use:   "validate BACKUP",
		Short: "Try a backup, by starting a temporary domain from it",
		Long: `Try a backup: start a temporary domain from it, which has no network, and let the
validation steps look at its guest. The backup is not changed, and the domain is
removed at the end. The exit status is 1 if it is not valid, or if this host
could not tell; "show" tells what each step found.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.names(1, backupNames),
	}
	var steps *[]string
	addWords(cmd, &steps, "steps", "try it by these, and not by those that are set: "+strings.Join(validationSteps(), ", "), validationSteps()...)
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		id, err := findBackup(ctx, c, args[0])
		if err != nil {
			return err
		}
		if steps != nil {
			o.Steps = *steps
		}
		job, err := c.ValidateBackup(ctx, id, o)
		if err != nil {
			return err
		}
		return a.finishAndTell(ctx, c, job)
	})
	return cmd
}

// repeated is a flag that is given once for each text.
type repeated struct{ value **[]string }

func (r repeated) String() string {
	if r.value == nil || *r.value == nil {
		return ""
	}
	return strings.Join(**r.value, " ")
}

// Set takes one more.
func (r repeated) Set(text string) error {
	if *r.value == nil {
		*r.value = &[]string{}
	}
	if text != "" {
		**r.value = append(**r.value, text)
	}
	return nil
}

// Type stands for the value in the help.
func (repeated) Type() string { return "TEXT" }

// validation says how backups are tried; "" if they are not.
func validation(o dbus.OfferingProperties) string {
	if !o.Validate {
		return ""
	}
	steps := o.ValidationSteps
	if len(steps) == 0 {
		steps = []string{"wait_for_boot", "screenshot", "judge_screen"}
	}
	return strings.Join(append([]string{"yes"}, steps...), ", ")
}

func validationCommand(o dbus.OfferingProperties) string {
	if o.ValidationCommand == "" {
		return ""
	}
	text := strings.Join(append([]string{o.ValidationCommand}, o.ValidationArguments...), " ")
	if o.ValidationExpected != "" {
		text += fmt.Sprintf(", which must write %s (base64)", o.ValidationExpected)
	}
	return text
}

// validated says what came of trying a backup the last time.
func validated(b dbus.BackupProperties) string {
	if b.ValidationResult == "" {
		return ""
	}
	text := fmt.Sprintf("%s, %s", b.ValidationResult, moment(b.Validated))
	if b.ValidationStep != "" {
		text += ", by " + b.ValidationStep
	}
	if b.ValidationCause != "" {
		text += ": " + b.ValidationCause
	}
	return text
}

// showBackup shows a backup, and what each step found when it was tried last.
func (a *app) showBackup(ctx context.Context, c *dbus.Client, b dbus.BackupProperties) error {
	var all []dbus.ValidationRecord
	if b.ValidationResult != "" {
		limit := uint32(1)
		if a.json != jsonOff {
			limit = 1000
		}
		var err error
		if all, err = c.Validations(ctx, b.ID, limit); err != nil {
			return err
		}
	}
	return a.show(append(members(b), member{"validations", all}), func(p *page) {
		backupPage(p, b)
		if len(all) > 0 {
			findingTable(p, all[0])
		}
	})
}

// outputLines is how much of what a guest said is shown to people of each step; JSON has all.
const outputLines = 10

func findingTable(p *page, v dbus.ValidationRecord) {
	var rows [][]string
	for _, f := range v.Findings {
		took := ""
		if f.Verdict != dbus.VerdictSkipped {
			took = brief(time.Duration(f.TookUsec) * time.Microsecond)
		}
		rows = append(rows, []string{f.Step, string(f.Verdict), took, f.Cause})
	}
	p.line("")
	p.table([]string{"STEP", "VERDICT", ">TOOK", "CAUSE"}, rows)
	for _, f := range v.Findings {
		if f.Output == "" {
			continue
		}
		p.line("")
		p.line("What %s saw:", f.Step)
		lines := strings.Split(strings.TrimRight(f.Output, "\n"), "\n")
		for _, line := range lines[max(0, len(lines)-outputLines):] {
			p.line("  %s", line)
		}
	}
	if v.HasScreenshot {
		p.line("")
		p.line("There is a screenshot: --screenshot FILE writes it.")
	}
}

// screenshotFlags say where a screenshot goes.
type screenshotFlags struct {
	file  string
	force bool
}

func (s *screenshotFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&s.file, "screenshot", "", "write the newest screenshot of the BACKUP's guest to this `FILE`, as PNG; - for standard output")
	f.BoolVar(&s.force, "force", false, "write over the file if there is one")
	complete(cmd, "screenshot", func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return []cobra.Completion{"png"}, cobra.ShellCompDirectiveFilterFileExt
	})
}

func (a *app) writeScreenshot(ctx context.Context, c *dbus.Client, backup string, to screenshotFlags) error {
	id, err := findBackup(ctx, c, backup)
	if err != nil {
		return err
	}
	png, err := c.Screenshot(ctx, id)
	if err != nil {
		return err
	}
	if to.file == "-" {
		_, err := a.out.Write(png)
		return err
	}
	if err := writeNew(to.file, png, to.force); err != nil {
		return err
	}
	a.say("The screenshot of %s is in %s.", id, to.file)
	return a.jsonRecord(object{{"backup", id}, {"file", to.file}, {"bytes", len(png)}}, nil)
}

// writeNew writes a file that is not there yet, or, by force, in place of the
// one that is. It is whole, or not there.
func writeNew(path string, content []byte, force bool) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".virtbackupctl-*")
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(content)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	if force {
		err = os.Rename(f.Name(), path)
	} else {
		err = os.Link(f.Name(), path) // unlike rename, it leaves alone what is there
	}
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is there already: --force writes over it", path)
	}
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	return nil
}
