package step

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/validation/screen"
)

const (
	// pingEvery is how long to wait after an agent did not answer.
	pingEvery = time.Second
	// watchEvery is how often the screen is looked at meanwhile.
	watchEvery = 10 * time.Second
)

// boot waits until the guest agent answers. With watch, it gives up as soon as
// the screen has said twice in a row that there is nothing to wait for.
type boot struct {
	timeout time.Duration
	watch   bool
}

func (boot) Name() string { return NameBoot }

func (b boot) Run(ctx context.Context, g Guest, _ []Finding) Finding {
	within, cancel := context.WithTimeout(ctx, b.timeout)
	defer cancel()
	var said string
	for look := time.Now().Add(watchEvery); ; {
		err := g.Ping(within)
		switch {
		case err == nil:
			return Finding{Verdict: Valid}
		case within.Err() != nil, errors.Is(err, ErrSilent), errors.Is(err, ErrRefused):
		default:
			return failed(err)
		}
		if b.watch && time.Now().After(look) {
			f, now := watch(within, g)
			if now != "" && now == said {
				return f
			}
			said, look = now, time.Now().Add(watchEvery)
		}
		select {
		case <-within.Done():
			return Finding{Verdict: NotValid, Cause: fmt.Sprintf("the guest agent did not answer within %s", b.timeout)}
		case <-time.After(pingEvery):
		}
	}
}

// watch looks whether the screen tells of a failure. It is only in passing: that
// it cannot says nothing.
func watch(ctx context.Context, g Guest) (f Finding, failure string) {
	picture, err := look(ctx, g)
	if err != nil {
		return Finding{}, ""
	}
	j := screen.Judge(picture)
	if j.Failure == "" {
		return Finding{}, ""
	}
	f = judged(j, false)
	f.Cause = "the guest agent does not answer, and " + f.Cause
	f.Screenshot, _ = screen.EncodePNG(picture, MaxScreenshot) // without it the verdict is the same
	return f, j.Failure
}
