package qcow2_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
)

// rewriteAsStored writes an image anew with all clusters in the form that they have.
func rewriteAsStored(t *testing.T, from, to string, size uint64) {
	t.Helper()
	image, err := openFile(t, from, qcow2.Limits{Size: size})
	if err != nil {
		t.Fatal(err)
	}
	c, err := qcow2.NewChain(image)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	w, err := qcow2.NewWriter(f, qcow2.WriterOptions{Size: size, Compression: image.Header().Compression, Level: 9})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	for off := uint64(0); off < size; off += qcow2.BufferSize {
		p := w.GetBuffer()[:min(qcow2.BufferSize, size-off)]
		forms, err := c.ReadForms(p, off, image.Header().Compression)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.WriteForms(off, p, forms); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
}

// Clusters that are copied in the form that they have stay what they are, and
// take no more room, however often that is done.
func TestFormsAreKept(t *testing.T) {
	const size = 5<<20 + 512
	want := model(size)
	dir := t.TempDir()
	raw := filepath.Join(dir, "raw")
	if err := os.WriteFile(raw, want, 0o600); err != nil {
		t.Fatal(err)
	}
	ours := func(c qcow2.Compression) func(string) {
		return func(path string) {
			if err := os.WriteFile(path, writeImage(t, want, qcow2.WriterOptions{Compression: c}), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	theirs := func(options ...string) func(string) {
		return func(path string) {
			run(t, "qemu-img", append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, options...), raw, path)...)
		}
	}
	for name, make := range map[string]func(path string){
		"none": ours(qcow2.CompressionNone), "zlib": ours(qcow2.CompressionZlib), "zstd": ours(qcow2.CompressionZstd),
		"QEMU's": theirs(), "QEMU's zlib": theirs("-c"), "QEMU's zstd": theirs("-c", "-o", "compression_type=zstd"),
		"QEMU's with clusters of another size": theirs("-c", "-o", "cluster_size=4096"),
	} {
		t.Run(name, func(t *testing.T) {
			last := filepath.Join(t.TempDir(), "0")
			make(last)
			for i, before := 0, []byte(nil); i < 4; i++ {
				next := last + "x"
				rewriteAsStored(t, last, next, size)
				run(t, "qemu-img", "check", "-q", next)
				run(t, "qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", raw, next)
				b, err := os.ReadFile(next)
				if err != nil {
					t.Fatal(err)
				}
				if i > 0 && !bytes.Equal(b, before) {
					t.Errorf("image %d has %d bytes, and the one before %d", i, len(b), len(before))
				}
				last, before = next, b
			}
		})
	}
}
