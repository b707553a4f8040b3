package step

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// pingEvery is how long to wait after an agent did not answer.
const pingEvery = time.Second

// boot waits until the guest agent answers.
type boot struct{ timeout time.Duration }

func (boot) Name() string { return NameBoot }

func (b boot) Run(ctx context.Context, g Guest, _ []Finding) Finding {
	within, cancel := context.WithTimeout(ctx, b.timeout)
	defer cancel()
	for {
		err := g.Ping(within)
		switch {
		case err == nil:
			return Finding{Verdict: Valid}
		case within.Err() != nil, errors.Is(err, ErrSilent), errors.Is(err, ErrRefused):
		default:
			return failed(err)
		}
		select {
		case <-within.Done():
			return Finding{Verdict: NotValid, Cause: fmt.Sprintf("the guest agent did not answer within %s", b.timeout)}
		case <-time.After(pingEvery):
		}
	}
}
