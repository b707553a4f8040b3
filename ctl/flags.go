package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
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

// optional is a flag that points to nil until it is given.
type optional[T any] struct {
	value **T
	parse func(text string) (T, error)
	kind  string // stands for the value in the help
}

func (o optional[T]) String() string {
	if o.value == nil || *o.value == nil {
		return ""
	}
	return fmt.Sprint(**o.value)
}

// Set takes a value.
func (o optional[T]) Set(text string) error {
	value, err := o.parse(text)
	if err != nil {
		return err
	}
	*o.value = &value
	return nil
}

// Type stands for the value in the help.
func (o optional[T]) Type() string { return o.kind }

func addNumber(cmd *cobra.Command, value **uint32, name, usage string) {
	parse := func(text string) (uint32, error) {
		n, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return 0, errors.New("say a whole number, not below 0")
		}
		return uint32(n), nil
	}
	cmd.Flags().Var(optional[uint32]{value, parse, "NUMBER"}, name, usage)
	complete(cmd, name, cobra.NoFileCompletions)
}

// addTruth adds a flag that is true without a value.
func addTruth(cmd *cobra.Command, value **bool, name, usage string) {
	parse := func(text string) (bool, error) {
		b, err := strconv.ParseBool(text)
		if err != nil {
			return false, errors.New("say true or false")
		}
		return b, nil
	}
	cmd.Flags().VarPF(optional[bool]{value, parse, "bool"}, name, "", usage).NoOptDefVal = "true"
	complete(cmd, name, fixed("true", "false"))
}

// addWords adds a flag that takes words with commas between, or none.
func addWords(cmd *cobra.Command, value **[]string, name, usage string, words ...string) {
	parse := func(text string) ([]string, error) {
		if text == "" {
			return []string{}, nil
		}
		return strings.Split(text, ","), nil
	}
	cmd.Flags().Var(optional[[]string]{value, parse, "LIST"}, name, usage)
	complete(cmd, name, fixed(words...))
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
