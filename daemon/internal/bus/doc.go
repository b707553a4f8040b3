// Package bus puts the daemon on the system bus: it exports a Backend as
// org.virtbackup1, has every call authorized before the Backend sees it, and
// tells listeners what changed. It knows D-Bus, and nothing of backups.
package bus
