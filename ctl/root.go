package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

const about = `Back up and restore libvirt domains with virtbackupd.

A verb that starts a job follows it to its end; Ctrl-C leaves the job running.
Exit status: 0 done, 1 failed, 2 usage, 3 not found, 4 refused by policy.`

func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:           "virtbackupctl",
		Short:         "Back up and restore libvirt domains",
		Long:          about,
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("host") {
				return nil
			}
			return checkHost(a.host)
		},
	}
	f := root.PersistentFlags()
	f.SortFlags = false
	f.StringVarP(&a.host, "host", "H", "", "speak to the virtbackupd of this `[USER@]HOST`, by ssh")
	a.json = jsonOff
	mode := f.VarPF(&jsonFlag{&a.json}, "json", "", "print JSON: pretty, short, off")
	mode.NoOptDefVal = string(jsonPretty)
	complete(root, "json", fixed(jsonMode("").Values()...))
	complete(root, "host", cobra.NoFileCompletions)
	f.BoolVar(&a.noLegend, "no-legend", false, "print tables without heads and hints")
	f.BoolVar(&a.noPager, "no-pager", false, "do not pipe long output into a pager")
	f.BoolVar(&a.noAskPassword, "no-ask-password", false, "do not ask for a password")
	f.BoolVar(&a.noBlock, "no-block", false, "print the ids of the jobs that are started, and do not follow them")
	root.AddGroup(&cobra.Group{ID: "daily", Title: "Daily:"}, &cobra.Group{ID: "set-up", Title: "Set-up:"})
	for _, cmd := range []*cobra.Command{
		a.statusCommand(), a.backupCommand(), a.listCommand(), a.showCommand(), a.restoreCommand(), a.verifyCommand(), a.validateCommand(), a.compressCommand(), a.repairCommand(),
		a.deleteCommand(), a.pruneCommand(), a.holdCommand(), a.releaseCommand(), a.finishChainCommand(), a.jobsCommand(), a.watchCommand(), a.cancelCommand(), a.retryCommand(), a.inhibitCommand(),
		a.usageCommand(),
	} {
		cmd.GroupID = "daily"
		root.AddCommand(cmd)
	}
	for _, cmd := range []*cobra.Command{
		a.repositoryCommand(), a.offeringCommand(), a.scheduleCommand(), a.domainCommand(), a.quotaCommand(), a.metricsCommand(), a.configCommand(), a.completionCommand(),
	} {
		cmd.GroupID = "set-up"
		root.AddCommand(cmd)
	}
	return root
}

// group makes a verb that only has verbs below it.
func group(use, short string, verbs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short}
	cmd.AddCommand(verbs...)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var names []string
		for _, verb := range verbs {
			names = append(names, verb.Name())
		}
		if len(args) > 0 {
			return fmt.Errorf("unknown verb %q: say %s %s", args[0], use, strings.Join(names, ", "))
		}
		return fmt.Errorf("say what to do: %s %s", use, strings.Join(names, ", "))
	}
	return cmd
}

// jsonFlag is --json.
type jsonFlag struct{ mode *jsonMode }

func (f *jsonFlag) String() string { return string(*f.mode) }

// Set takes a word.
func (f *jsonFlag) Set(word string) error {
	var mode *jsonMode
	if err := (choice[jsonMode]{&mode}).Set(word); err != nil {
		return err
	}
	*f.mode = *mode
	return nil
}

// Type stands for the value in the help.
func (*jsonFlag) Type() string { return "WORD" }

func (a *app) completionCommand() *cobra.Command {
	return &cobra.Command{
		Use:                   "completion {bash|zsh|fish}",
		Short:                 "Print the shell's completion script",
		DisableFlagsInUseLine: true,
		ValidArgs:             []string{"bash", "zsh", "fish"},
		Args:                  cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		RunE: func(cmd *cobra.Command, args []string) error {
			a.started = true
			switch args[0] {
			case "bash":
				return cmd.Root().GenBashCompletionV2(a.out, true)
			case "zsh":
				return cmd.Root().GenZshCompletion(a.out)
			}
			return cmd.Root().GenFishCompletion(a.out, true)
		},
	}
}
