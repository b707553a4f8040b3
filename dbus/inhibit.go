package dbus

import (
	"context"
	"fmt"

	godbus "github.com/godbus/dbus/v5"
)

// Inhibit holds jobs back until ctx ends or the Client is closed, also over
// restarts of the daemon. what are classes of jobs; none for all. It returns
// when they are held back; lost is told when they cannot be again after a restart.
func (c *Client) Inhibit(ctx context.Context, what []string, who, why string, lost func(error)) error {
	signals := make(chan *godbus.Signal, 16)
	c.conn.Signal(signals)
	rule := []godbus.MatchOption{
		godbus.WithMatchSender(busDaemon), godbus.WithMatchInterface(busDaemon), godbus.WithMatchMember("NameOwnerChanged"), godbus.WithMatchArg(0, BusName),
	}
	end := func() {
		_ = c.conn.RemoveMatchSignal(rule...)
		c.conn.RemoveSignal(signals)
	}
	hold := func() error {
		return c.object(ctx, Ref{Kind: KindManager}, "Inhibit", []any{append([]string{}, what...), who, why, EncodeOptions(NoOptions{})})
	}
	if err := c.conn.AddMatchSignalContext(ctx, rule...); err != nil {
		c.conn.RemoveSignal(signals)
		return fmt.Errorf("cannot listen on the bus: %w", err)
	}
	if err := hold(); err != nil {
		end()
		return err
	}
	go func() {
		defer end()
		for {
			select {
			case <-ctx.Done():
				return
			case s, open := <-signals:
				if !open {
					return
				}
				if !appeared(s) {
					continue
				}
				if err := hold(); err != nil && ctx.Err() == nil {
					lost(err)
				}
			}
		}
	}()
	return nil
}

// appeared says whether a signal tells that the daemon has come to the bus.
func appeared(s *godbus.Signal) bool {
	var name, before, now string
	return s.Name == busDaemon+".NameOwnerChanged" && godbus.Store(s.Body, &name, &before, &now) == nil && name == BusName && now != ""
}
