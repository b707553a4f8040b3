package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/virtbackup/virtbackup/dbus"
)

// choice is a flag that takes one of some words. It points to nil until it is given.
type choice[T interface {
	~string
	Values() []string
}] struct{ value **T }

func (c choice[T]) String() string {
	if c.value == nil || *c.value == nil {
		return ""
	}
	return string(**c.value)
}

// Set takes a word.
func (c choice[T]) Set(word string) error {
	value := T(word)
	if !slices.Contains(value.Values(), word) {
		return fmt.Errorf("say one of %s", strings.Join(value.Values(), ", "))
	}
	*c.value = &value
	return nil
}

// Type stands for the value in the help.
func (choice[T]) Type() string { return "WORD" }

// addChoice adds such a flag, with the words in its help and completion.
func addChoice[T interface {
	~string
	Values() []string
}](cmd *cobra.Command, value **T, name, usage string) *pflag.Flag {
	var none T
	flag := cmd.Flags().VarPF(choice[T]{value}, name, "", usage+": "+strings.Join(none.Values(), ", "))
	complete(cmd, name, fixed(none.Values()...))
	return flag
}

// complete sets what a flag is completed with.
func complete(cmd *cobra.Command, flag string, f cobra.CompletionFunc) {
	if err := cmd.RegisterFlagCompletionFunc(flag, f); err != nil {
		panic(err) // a flag that this program did not define
	}
}

// fixed completes with some words.
func fixed(words ...string) cobra.CompletionFunc {
	return cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)
}

// settingsFlags are the flags of an offering's settings, which a backup can override.
type settingsFlags struct {
	settings  dbus.Settings
	level     uint32
	threads   uint32
	chainSize uint32
}

func addSettings(cmd *cobra.Command) *settingsFlags {
	s := &settingsFlags{}
	f := cmd.Flags()
	addChoice(cmd, &s.settings.Mode, "mode", "how backups build on each other")
	addChoice(cmd, &s.settings.Compression, "compression", "how data is compressed")
	f.Uint32Var(&s.level, "level", 0, "level of compression: 1 to 9 for zlib, 1 to 22 for zstd, 0 for the method's own")
	f.Uint32Var(&s.threads, "threads", 0, "compressing threads, 0 for one per CPU")
	f.Uint32Var(&s.chainSize, "chain-size", 0, "backups in a chain at most, 0 for no limit")
	addChoice(cmd, &s.settings.Quiesce, "quiesce", "how the guest is quieted")
	addChoice(cmd, &s.settings.QuiescePolicy, "quiesce-policy", "what if it cannot be: fail, or back up less consistent")
	addChoice(cmd, &s.settings.Tracking, "tracking", "how changes are found")
	addChoice(cmd, &s.settings.Fallback, "fallback", "what of a disk whose changes are not known: compare, or store all of it")
	for _, name := range []string{"level", "threads", "chain-size"} {
		complete(cmd, name, cobra.NoFileCompletions)
	}
	return s
}

// given returns the settings that the command line has.
func (s *settingsFlags) given(cmd *cobra.Command) dbus.Settings {
	set := func(name string, from *uint32, to **uint32) {
		if cmd.Flags().Changed(name) {
			*to = from
		}
	}
	set("level", &s.level, &s.settings.CompressionLevel)
	set("threads", &s.threads, &s.settings.Threads)
	set("chain-size", &s.chainSize, &s.settings.ChainSize)
	return s.settings
}
