package main

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/google/renameio/v2"
)

// keySize is that of HMAC-SHA256, which authenticates manifests.
const keySize = 32

// makeKey makes the host's manifest key when there is none. One that is there
// is never replaced: no backup that it authenticates could be used any more.
func makeKey(path string) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	key := make([]byte, keySize)
	if _, err := rand.Read(key); err != nil {
		return fmt.Errorf("cannot make the host's key: %w", err)
	}
	if err := renameio.WriteFile(path, []byte(hex.EncodeToString(key)+"\n"), 0o600); err != nil {
		return fmt.Errorf("cannot write the host's key: %w", err)
	}
	return nil
}
