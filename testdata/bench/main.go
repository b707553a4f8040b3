// Bench measures virtbackup on a lab host, and other tools beside it: each
// round runs every measurement once, in turn, so that what else the machine
// does meets all alike. It writes the medians as a table for README.md.
//
// A tool's time ends when its output is synced. Ours is that of the job, from
// the call over D-Bus to its end: it holds what the others leave out, reading
// back all that was written.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"
)

// measurement is one row of the table.
type measurement struct {
	name string
	run  func(ctx context.Context) (figure, error)
}

// figure is what one run gave.
type figure struct {
	took   time.Duration // until the output is synced
	worker time.Duration // of it, that of our worker; 0 for others
	phases phases        // of the worker
	cpu    time.Duration // that the worker used
	stored int64         // bytes of the output
	note   string
}

// group is a part of the table. The first measurement is the one the others
// are compared with.
type group struct {
	key, title string
	before     func(ctx context.Context) error // each round; may be nil
	rows       []measurement
	after      func(ctx context.Context) error
	figures    [][]figure // by row, then round
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := bench(ctx, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func bench(ctx context.Context, output string) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v\n%s", p, debug.Stack())
		}
	}()
	rounds := 5
	if s := os.Getenv("BENCH_ROUNDS"); s != "" {
		if rounds, err = strconv.Atoi(s); err != nil || rounds < 1 {
			return fmt.Errorf("BENCH_ROUNDS=%s is not a number of rounds", s)
		}
	}
	var text strings.Builder
	if os.Getenv("BENCH_ONLY") != "scale" {
		if err := rounded(ctx, rounds, &text); err != nil {
			return err
		}
	}
	// The last one: it leaves a catalog of which no backup is there.
	if wanted("scale") {
		if err := scale(ctx, &text); err != nil {
			return fmt.Errorf("scale: %w", err)
		}
	}
	fmt.Print(text.String())
	return os.WriteFile(output, []byte(text.String()), 0o644)
}

// rounded measures what a guest is needed for.
func rounded(ctx context.Context, rounds int, text *strings.Builder) error {
	b, err := newHost(ctx)
	if err != nil {
		return err
	}
	groups := slices.DeleteFunc(append(b.groups(), b.servings()...), func(g *group) bool { return !wanted(g.key) })
	for round := range rounds {
		for _, g := range groups {
			fmt.Fprintf(os.Stderr, "bench: round %d of %d: %s\n", round+1, rounds, g.title)
			if err := g.round(ctx, round); err != nil {
				return fmt.Errorf("%s: %w", g.title, err)
			}
		}
	}
	fmt.Fprintf(text, "Medians of %d interleaved rounds, %s. %s\n", rounds, b.describe(), explanation)
	for _, g := range groups {
		g.table(text)
	}
	if wanted("memory") {
		if err := b.memory(ctx, text); err != nil {
			return fmt.Errorf("memory: %w", err)
		}
	}
	if wanted("hook") {
		if err := b.hook(ctx, text); err != nil {
			return fmt.Errorf("hook: %w", err)
		}
	}
	return nil
}

// wanted tells whether BENCH_ONLY names a part, or nothing.
func wanted(key string) bool {
	only := os.Getenv("BENCH_ONLY")
	return only == "" || slices.Contains(strings.Split(only, ","), key)
}

// round measures every row once. Each round begins with another row.
func (g *group) round(ctx context.Context, round int) error {
	if g.figures == nil {
		g.figures = make([][]figure, len(g.rows))
	}
	if g.before != nil {
		if err := g.before(ctx); err != nil {
			return err
		}
	}
	for i := range g.rows {
		at := (i + round) % len(g.rows)
		if err := warm(); err != nil {
			return err
		}
		f, err := g.rows[at].run(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", g.rows[at].name, err)
		}
		fmt.Fprintf(os.Stderr, "bench: %8.2f s  %5d MiB  %s%s\n", f.took.Seconds(), f.stored>>20, g.rows[at].name, f.detail())
		g.figures[at] = append(g.figures[at], f)
	}
	if g.after != nil {
		return g.after(ctx)
	}
	return nil
}

func (f figure) detail() string {
	text := ""
	if f.worker != 0 {
		text = fmt.Sprintf(" (worker %.2f s: %v; %.2f s of CPU)", f.worker.Seconds(), f.phases, f.cpu.Seconds())
	}
	if f.note != "" {
		text += ": " + f.note
	}
	return text
}

const explanation = "Each tool's time includes syncing what it wrote. Ours is that of the whole job over D-Bus, " +
	"with reading back and comparing all that was written, which no other does; *worker* is the unit that moves the data, " +
	"*copying* what the guest notices of it. A ratio over 1 means that ours is faster."

func (g *group) table(text *strings.Builder) {
	fmt.Fprintf(text, "\n| %s | seconds | ratio | MiB |\n| --- | --- | --- | --- |\n", g.title)
	base := median(g.figures[0], func(f figure) float64 { return f.took.Seconds() })
	for i, row := range g.rows {
		seconds := median(g.figures[i], func(f figure) float64 { return f.took.Seconds() })
		times, note := fmt.Sprintf("%.2f", seconds), ""
		if last := g.figures[i][len(g.figures[i])-1]; last.note != "" {
			note = ": " + last.note
		}
		if g.figures[i][0].worker != 0 {
			times += fmt.Sprintf(" (worker %.2f, copying %.2f)",
				median(g.figures[i], func(f figure) float64 { return f.worker.Seconds() }),
				median(g.figures[i], func(f figure) float64 { return f.phases.took("copying").Seconds() }))
		}
		stored := median(g.figures[i], func(f figure) float64 { return float64(f.stored) / (1 << 20) })
		fmt.Fprintf(text, "| %s%s | %s | %.2f | %.0f |\n", row.name, note, times, seconds/base, stored)
	}
}

func median(list []figure, value func(figure) float64) float64 {
	values := make([]float64, len(list))
	for i, f := range list {
		values[i] = value(f)
	}
	slices.Sort(values)
	n := len(values)
	return (values[(n-1)/2] + values[n/2]) / 2
}
