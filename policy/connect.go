package policy

import (
	"fmt"
	"log/slog"

	godbus "github.com/godbus/dbus/v5"
)

// ConnectPolkit makes an authorizer that asks the system's polkitd, over a
// connection of its own: checks that wait for a password must not hold up
// calls. Close ends it.
func ConnectPolkit(log *slog.Logger) (p *Polkit, closeConnection func() error, err error) {
	conn, err := godbus.ConnectSystemBus()
	if err != nil {
		return nil, nil, fmt.Errorf("cannot connect to the system bus: %w", err)
	}
	return NewPolkit(conn, log), conn.Close, nil
}
