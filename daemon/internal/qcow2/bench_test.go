package qcow2_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
)

// mixed is the disk of the benchmarks: zeros, text (the source of Go's library)
// and noise, a third each, in runs of 192 KiB.
func mixed(b *testing.B) []byte {
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		b.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(root)), "src/*/*.go"))
	if err != nil {
		b.Fatal(err)
	}
	var words []byte
	for _, name := range files {
		p, err := os.ReadFile(name)
		if err != nil {
			b.Fatal(err)
		}
		words = append(words, p...)
	}
	const part = 192 << 10
	disk := make([]byte, 512<<20)
	for at, n := 0, 0; at < len(disk); at, n = at+part, n+1 {
		p := disk[at:min(at+part, len(disk))]
		switch n % 3 {
		case 1:
			copy(p, words[n*99_991%(len(words)-part):])
		case 2:
			noise(p, uint64(n))
		}
	}
	return disk
}

// shm is where writing costs the processor only.
func shm(b *testing.B) string {
	dir, err := os.MkdirTemp("/dev/shm", "qcow2")
	if err != nil {
		b.Skip(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// processor reports processor time, which other load on the machine disturbs
// less than the clock.
func processor(b *testing.B, who int, bytes int) func() {
	var before syscall.Rusage
	if err := syscall.Getrusage(who, &before); err != nil {
		b.Fatal(err)
	}
	return func() {
		var after syscall.Rusage
		if err := syscall.Getrusage(who, &after); err != nil {
			b.Fatal(err)
		}
		spent := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
		b.ReportMetric(float64(spent)/1e9/float64(b.N)/float64(bytes)*(1<<30), "cpu-s/GiB")
	}
}

func BenchmarkWriter(b *testing.B) {
	disk := mixed(b)
	full := make([]byte, len(disk))
	noise(full, 1)
	for _, test := range []struct {
		name string
		disk []byte
		o    qcow2.WriterOptions
	}{
		{"none/full", full, qcow2.WriterOptions{}},
		{"none/mixed", disk, qcow2.WriterOptions{}},
		{"zstd3/mixed", disk, qcow2.WriterOptions{Compression: "zstd", Level: 3}},
		{"zstd6/mixed", disk, qcow2.WriterOptions{Compression: "zstd", Level: 6}},
		{"zstd9/mixed", disk, qcow2.WriterOptions{Compression: "zstd", Level: 9}},
		{"zlib/mixed", disk, qcow2.WriterOptions{Compression: "zlib"}},
	} {
		b.Run(test.name, func(b *testing.B) {
			path := filepath.Join(shm(b), "image")
			b.SetBytes(int64(len(test.disk)))
			defer processor(b, syscall.RUSAGE_SELF, len(test.disk))()
			for b.Loop() {
				_ = os.Remove(path)
				f, err := os.Create(path)
				if err != nil {
					b.Fatal(err)
				}
				test.o.Size = uint64(len(test.disk))
				write(b, f, test.disk, test.o)
				info, err := f.Stat()
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(info.Size())/float64(len(test.disk)), "size")
				_ = f.Close()
			}
		})
	}
}

func write(b *testing.B, f *os.File, disk []byte, o qcow2.WriterOptions) {
	w, err := qcow2.NewWriter(f, o)
	if err != nil {
		b.Fatal(err)
	}
	for off := 0; off < len(disk); {
		p := w.GetBuffer()
		n := copy(p, disk[off:]) // stands for what the kernel copies from a socket
		if err := w.WriteData(uint64(off), p[:n]); err != nil {
			b.Fatal(err)
		}
		off += n
	}
	if err := w.Finish(); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkConvert is qemu-img on the same disk.
func BenchmarkConvert(b *testing.B) {
	dir := shm(b)
	raw := filepath.Join(dir, "raw")
	disk := mixed(b)
	if err := os.WriteFile(raw, disk, 0o600); err != nil {
		b.Fatal(err)
	}
	for name, args := range map[string][]string{
		"none": nil,
		"zlib": {"-c"},
		"zstd": {"-c", "-o", "compression_type=zstd"},
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(disk)))
			defer processor(b, syscall.RUSAGE_CHILDREN, len(disk))()
			for b.Loop() {
				path := filepath.Join(dir, "image")
				args := append([]string{"convert", "-W", "-m", "16", "-f", "raw", "-O", "qcow2"}, args...)
				if out, err := exec.Command("qemu-img", append(args, raw, path)...).CombinedOutput(); err != nil {
					b.Fatalf("%v: %s", err, out)
				}
				info, err := os.Stat(path)
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(info.Size())/float64(len(disk)), "size")
			}
		})
	}
}
