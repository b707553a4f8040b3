package transfer

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// BenchmarkBackup compares a full backup of 1 GiB of data with qemu-img convert
// from the same kind of export, and shows the worker's parts.
//
//	go test -run - -bench Backup -benchtime 1x ./daemon/internal/transfer
func BenchmarkBackup(b *testing.B) {
	h := newHost(b)
	d := h.disk("vda", "qcow2", 2<<30)
	fillMixed(h, d, 1<<30)
	for _, compression := range []string{"none", "zstd"} {
		b.Run("worker/"+compression, func(b *testing.B) {
			b.SetBytes(1 << 30)
			for b.Loop() {
				id := h.id()
				spec := h.backupSpec(id, "", id, d)
				spec.Compression = compression
				if r := h.take(spec, d); r.Error != nil {
					b.Fatal(r.Error)
				}
				if r := h.run(Spec{Operation: OperationDelete, Backups: []string{id}}); r.Error != nil {
					b.Fatal(r.Error)
				}
				h.command("qemu-img", "bitmap", "--remove", d.path, bitmapName(id))
			}
		})
		b.Run("qemu-img/"+compression, func(b *testing.B) {
			b.SetBytes(1 << 30)
			for b.Loop() {
				socket, stop := d.export(h, "")
				out := filepath.Join(h.dir, "convert.qcow2")
				args := []string{"convert", "-t", "writeback", "-W", "-m16", "-f", "raw", "-O", "qcow2"}
				if compression != "none" {
					args = append(args, "-c", "-o", "compression_type="+compression)
				}
				h.command("qemu-img", append(args, fmt.Sprintf("nbd:unix:%s:exportname=%s", socket, d.target), out)...)
				h.command("sync", out)
				stop()
				if err := os.Remove(out); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkRestore(b *testing.B) {
	h := newHost(b)
	d := h.disk("vda", "qcow2", 2<<30)
	fillMixed(h, d, 1<<30)
	id := h.mustTake("", "", d)
	for _, format := range []string{FormatRaw, FormatQcow2} {
		b.Run(format, func(b *testing.B) {
			b.SetBytes(1 << 30)
			for b.Loop() {
				dir := filepath.Join(h.dir, fmt.Sprint(time.Now().UnixNano()))
				if err := os.Mkdir(dir, 0o700); err != nil {
					b.Fatal(err)
				}
				if r := h.restore(id, format, dir, "vda"); r.Error != nil {
					b.Fatal(r.Error)
				}
				os.RemoveAll(dir)
			}
		})
	}
}

// fillMixed writes data of which a bit less than half compresses away.
func fillMixed(h *host, d disk, bytes int) {
	h.Helper()
	script := fmt.Sprintf(`i=0; while [ $i -lt %d ]; do head -c 600k /dev/urandom; head -c 424k /dev/zero | tr '\0' 'a'; i=$((i+1)); done >%s.fill`,
		bytes>>20, d.path)
	h.command("sh", "-c", script)
	h.command("qemu-img", "convert", "-n", "-f", "raw", "-O", d.format, "--target-is-zero", d.path+".fill", d.path)
	os.Remove(d.path + ".fill")
}
