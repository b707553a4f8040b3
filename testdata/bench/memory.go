package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/virtbackup/virtbackup/dbus"
)

// memory measures what the worker takes for a disk of 1 TiB with little in it.
func (b *host) memory(ctx context.Context, text *strings.Builder) error {
	fmt.Fprintf(text, "\n| worker's peak memory | MiB |\n| --- | --- |\n")
	if err := b.memoryOf(ctx, text, "2 GiB", domain); err != nil {
		return err
	}
	const name, file = "sparse", "/var/lib/libvirt/images/sparse-vda.qcow2"
	if err := command(ctx, "lab-domain", "create", name, "--disk", "qcow2:1T"); err != nil {
		return err
	}
	for at := range 64 {
		if err := command(ctx, "qemu-io", "-c", fmt.Sprintf("write -q -P 7 %dG 1M", at*16), file); err != nil {
			return err
		}
	}
	if err := command(ctx, "lab-domain", "start", name); err != nil {
		return err
	}
	return b.memoryOf(ctx, text, "1 TiB, 64 MiB of data scattered", name)
}

func (b *host) memoryOf(ctx context.Context, text *strings.Builder, title, name string) error {
	uuid, err := b.client.FindDomain(ctx, name)
	if err != nil {
		return err
	}
	for _, compression := range []dbus.Compression{dbus.CompressionNone, dbus.CompressionZstd} {
		o := dbus.BackupOptions{Repository: "plain", Isolated: true, Settings: dbus.Settings{Compression: &compression}}
		_, f, w, err := b.job(ctx, func() (string, error) { return b.client.BackupDomain(ctx, uuid, o) })
		if err != nil {
			return fmt.Errorf("%s: %w", title, err)
		}
		fmt.Fprintf(text, "| full backup (%s) of a disk of %s (%.1f s) | %.0f |\n", compression, title, f.took.Seconds(), mib(w.memory))
	}
	return nil
}
