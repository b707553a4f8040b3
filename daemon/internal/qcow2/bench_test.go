package qcow2_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/digest"
	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
)

// mixed is the disk of the benchmarks: zeros, text and noise, a third each, in
// runs of 192 KiB.
func mixed() []byte {
	disk := make([]byte, 512<<20)
	words := make([]byte, 1<<20)
	text(words, 1)
	for at, n := 0, 0; at < len(disk); at, n = at+192<<10, n+1 {
		part := disk[at:min(at+192<<10, len(disk))]
		switch n % 3 {
		case 1:
			copy(part, words[n*977%(len(words)-192<<10):])
		case 2:
			noise(part, uint64(n))
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

// BenchmarkWriter digests all clusters in the workers too, as a backup does.
func BenchmarkWriter(b *testing.B) {
	disk := mixed()
	full := make([]byte, len(disk))
	noise(full, 1)
	for _, test := range []struct {
		name string
		disk []byte
		o    qcow2.WriterOptions
	}{
		{"none/full", full, qcow2.WriterOptions{}},
		{"none/mixed", disk, qcow2.WriterOptions{}},
		{"zstd1/mixed", disk, qcow2.WriterOptions{Compression: "zstd", Level: 1}},
		{"zstd3/mixed", disk, qcow2.WriterOptions{Compression: "zstd", Level: 3}},
		{"zstd9/mixed", disk, qcow2.WriterOptions{Compression: "zstd", Level: 9}},
		{"zlib/mixed", disk, qcow2.WriterOptions{Compression: "zlib"}},
	} {
		b.Run(test.name, func(b *testing.B) {
			path := filepath.Join(shm(b), "image")
			b.SetBytes(int64(len(test.disk)))
			b.ReportAllocs()
			for b.Loop() {
				_ = os.Remove(path)
				f, err := os.Create(path)
				if err != nil {
					b.Fatal(err)
				}
				digests := digest.New(uint64(len(test.disk)))
				test.o.Size = uint64(len(test.disk))
				test.o.OnCluster = func(n uint64, plain []byte) {
					if plain != nil {
						digests.Set(int(n), digest.Sum(plain))
					}
				}
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
	disk := mixed()
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
