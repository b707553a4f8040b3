package transfer

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// TestAttach puts screenshots beside a backup: they count for nothing, change
// nothing, and go with it.
func TestAttach(t *testing.T) {
	h := newHistory(t, 5)
	h.change()
	h.backup()
	p := h.points[0]
	path := filepath.Join(filepath.Dir(h.image(p.id, "vda")), repository.ScreenshotName)
	shot := func(text string) []byte { return append([]byte("\x89PNG\r\n\x1a\n"), text...) }
	attach := func(backup string, png []byte) *Failure {
		return h.run(Spec{Operation: OperationAttach, Attach: &AttachSpec{Backup: backup, PNG: png}}).Error
	}
	for _, text := range []string{"first", "second"} {
		if err := attach(p.id, shot(text)); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, shot(text)) {
			t.Errorf("%q, %v", got, err)
		}
	}
	for name, test := range map[string]struct {
		backup string
		png    []byte
		class  Class
	}{
		"nowhere": {h.id(), shot("x"), ClassMissing}, "no PNG": {p.id, []byte("GIF"), ClassInternal}, "large": {p.id, shot(string(make([]byte, 3<<20))), ClassRepository},
	} {
		if err := attach(test.backup, test.png); err == nil || err.Class != test.class {
			t.Errorf("%s: %+v", name, err)
		}
	}
	// A worker that died left a part of one.
	half := path + "~1." + h.id()
	if err := os.WriteFile(half, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := attach(p.id, shot("third")); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(half); !os.IsNotExist(err) {
		t.Errorf("what was left is there: %v", err)
	}
	h.exact()
	h.checkClean()
	if r := h.run(Spec{Operation: OperationDelete, Backups: []string{p.id}}); r.Error != nil {
		t.Fatal(r.Error)
	}
	if _, err := os.Stat(filepath.Dir(path)); !os.IsNotExist(err) {
		t.Errorf("the backup is gone, and its screenshot not: %v", err)
	}
}
