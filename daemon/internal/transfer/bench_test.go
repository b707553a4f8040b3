package transfer

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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

// BenchmarkServe reads a chain of two through the worker, and through qemu-nbd
// on the same chain, which compares nothing: as nbdcopy does, many requests at
// once, and as a guest that boots does, one after the other.
func BenchmarkServe(b *testing.B) {
	program := buildWorker(b)
	for _, compression := range []string{"none", "zstd"} {
		h := newHost(b)
		d := h.disk("vda", "qcow2", 1<<30)
		fillMixed(h, d, 512<<20)
		full, increment := h.id(), h.id()
		for _, spec := range []*BackupSpec{h.backupSpec(full, "", full, d), h.backupSpec(increment, full, full, d)} {
			spec.Compression = compression
			if r := h.take(spec, d); r.Error != nil {
				b.Fatal(r.Error)
			}
			for at := range 256 {
				d.io(h, fmt.Sprintf("write -P %d %d 64k", at, at<<21))
			}
		}
		s := h.serveSpec(increment, "vda")
		dir := h.job(Spec{Operation: OperationServe, Serve: s})
		c := exec.Command(program, dir)
		if err := c.Start(); err != nil {
			b.Fatal(err)
		}
		awaitPhase(h, dir, PhaseServing)
		other, stop := disk{"other", h.image(increment, "vda"), "qcow2", d.size}.export(h, "")
		for _, how := range [][]string{{"nbdcopy"}, {"nbdcopy", "--connections=1"}, {"nbdcopy", "--synchronous", "--request-size=131072"}} {
			for name, uri := range map[string]string{"worker": "nbd+unix:///vda?socket=" + s.Disks[0].Socket, "qemu-nbd": "nbd+unix:///other?socket=" + other} {
				b.Run(fmt.Sprintf("%s/%s/%s", compression, strings.Join(how, ""), name), func(b *testing.B) {
					b.SetBytes(512 << 20)
					for b.Loop() {
						h.command(how[0], append(how[1:], uri, "null:")...)
					}
				})
			}
		}
		stop()
		if err := WriteStop(dir); err != nil {
			b.Fatal(err)
		}
		if err := c.Wait(); err != nil {
			b.Fatal(err)
		}
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
