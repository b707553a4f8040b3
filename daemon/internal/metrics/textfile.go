package metrics

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/google/renameio/v2"
)

// Textfile writes the metrics to a file again and again, for node_exporter's
// textfile collector.
type Textfile struct {
	// Path and interval are read anew each time; an empty path is no file.
	Settings func() (path string, interval time.Duration)
	Text     func(ctx context.Context) (string, error)
	Log      *slog.Logger
}

// lookAgain is how soon a change of the settings is seen.
const lookAgain = 2 * time.Second

// Run writes until ctx ends. It says once, not each time, that it cannot.
func (t Textfile) Run(ctx context.Context) {
	var last time.Time
	var at, failed string
	for {
		path, interval := t.Settings()
		if path == "" {
			failed = ""
		} else if path != at || time.Since(last) >= interval {
			last = time.Now()
			if err := t.write(ctx, path); err == nil {
				failed = ""
			} else if ctx.Err() == nil && failed != err.Error() {
				failed = err.Error()
				t.Log.Warn("cannot write the metrics", "error", err)
			}
		}
		at = path
		select {
		case <-ctx.Done():
			return
		case <-time.After(min(interval, lookAgain)):
		}
	}
}

// write writes the file at once: whoever reads it finds the old or the new one.
func (t Textfile) write(ctx context.Context, path string) error {
	text, err := t.Text(ctx)
	if err != nil {
		return err
	}
	// Others than root read it. A temporary file's name does not end in .prom.
	if err := renameio.WriteFile(path, []byte(text), 0o644, renameio.IgnoreUmask()); err != nil {
		return fmt.Errorf("cannot write metrics.textfile: %w", err)
	}
	return nil
}
