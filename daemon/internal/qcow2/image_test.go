package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
)

// model fills a disk with zeros, text and noise by turns.
func model(size int) []byte {
	p := make([]byte, size)
	for at, n := 0, 0; at < size; at, n = at+100_000, n+1 {
		part := p[at:min(at+100_000, size)]
		switch n % 3 {
		case 1:
			text(part, uint64(n))
		case 2:
			noise(part, uint64(n))
		}
	}
	return p
}

func openFile(t testing.TB, path string, lim qcow2.Limits) (*qcow2.Image, error) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return qcow2.Open(f, info.Size(), lim)
}

// Images of qemu-img's are read right, whatever their kind.
func TestImagesOfQEMU(t *testing.T) {
	const size = 5<<20 + 512
	want := model(size)
	raw := filepath.Join(t.TempDir(), "raw")
	if err := os.WriteFile(raw, want, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, options := range []string{
		"compat=0.10", "compat=1.1", "lazy_refcounts=on", "preallocation=metadata", "refcount_bits=1", "refcount_bits=64",
		"cluster_size=512", "cluster_size=4096", "cluster_size=2M",
		"-c", "-c,compat=0.10", "-c,cluster_size=512", "-c,cluster_size=4096", "-c,cluster_size=2M",
		"-c,compression_type=zstd", "-c,compression_type=zstd,cluster_size=4096", "-c,compression_type=zstd,cluster_size=2M",
	} {
		t.Run(options, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image")
			args := []string{"convert", "-f", "raw", "-O", "qcow2"}
			rest, compress := strings.CutPrefix(options, "-c")
			if compress {
				args = append(args, "-c")
			}
			if rest = strings.TrimPrefix(rest, ","); rest != "" {
				args = append(args, "-o", rest)
			}
			run(t, "qemu-img", append(args, raw, path)...)
			i, err := openFile(t, path, qcow2.Limits{Size: size})
			if err != nil {
				t.Fatal(err)
			}
			if err := i.Check(t.Context()); err != nil {
				t.Error(err)
			}
			c, err := qcow2.NewChain(i)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, size)
			if _, err := c.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%v, or the content differs", err)
			}
			var data uint64
			err = c.Extents(0, size, func(_, n uint64, kind qcow2.Kind) error {
				if kind == qcow2.Data {
					data += n
				}
				return nil
			})
			if err != nil || data == 0 || data == size && !strings.Contains(options, "2M") && !strings.Contains(options, "prealloc") {
				t.Errorf("%d bytes of data, %v", data, err)
			}
		})
	}
}

// A backing file shorter or longer than the disk, other cluster sizes, and
// zero clusters above data.
func TestChainOfQEMU(t *testing.T) {
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base"), filepath.Join(dir, "top")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", base, "1M")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", base)
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", top, "2M")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -z 64k 64k", "-c", "write -P 2 200k 8k", "-c", "write -P 3 1536k 4k", top)
	want := bytes.Repeat([]byte{1}, 1<<20)
	want = append(want, make([]byte, 1<<20)...)
	clear(want[64<<10 : 128<<10])
	copy(want[200<<10:], bytes.Repeat([]byte{2}, 8<<10))
	copy(want[1536<<10:], bytes.Repeat([]byte{3}, 4<<10))
	var images []*qcow2.Image
	for _, path := range []string{top, base} {
		i, err := openFile(t, path, qcow2.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		images = append(images, i)
	}
	c, err := qcow2.NewChain(images...)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := c.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%v, or the content differs", err)
	}
	if _, err := qcow2.NewChain(images[0]); err == nil {
		t.Error("a chain without its base is accepted")
	}
	if _, err := qcow2.NewChain(images[1], images[0]); err == nil {
		t.Error("a chain upside down is accepted")
	}
}

// writeImage writes a small image of ours.
func writeImage(t testing.TB, disk []byte, o qcow2.WriterOptions) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	o.Size = uint64(len(disk))
	w, err := qcow2.NewWriter(f, o)
	if err != nil {
		t.Fatal(err)
	}
	for off := 0; off < len(disk); {
		b := w.GetBuffer()
		n := copy(b, disk[off:])
		if err := w.WriteData(uint64(off), b[:n]); err != nil {
			t.Fatal(err)
		}
		off += n
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	file, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// QEMU reads a truncated image as zeros. We must not.
func TestTruncatedFileIsAnError(t *testing.T) {
	disk := make([]byte, 1<<20+512)
	text(disk, 1)
	noise(disk[300_000:600_000], 2)
	for _, compression := range []qcow2.Compression{"none", "zlib", "zstd"} {
		file := writeImage(t, disk, qcow2.WriterOptions{Compression: compression})
		for n := 0; n < len(file); n += 1 + len(file)/500 {
			if err := readAll(t, file[:n], disk); err == nil {
				t.Errorf("%s: %d of %d bytes are read without an error", compression, n, len(file))
			}
		}
		if err := readAll(t, file, disk); err != nil {
			t.Errorf("%s: the whole file: %v", compression, err)
		}
	}
}

// readAll reads an image's disk; it is fatal if that succeeds with other data.
func readAll(t *testing.T, file, want []byte) error {
	t.Helper()
	i, err := qcow2.Open(bytes.NewReader(file), int64(len(file)), qcow2.Limits{})
	if err != nil {
		return err
	}
	c, err := qcow2.NewChain(i)
	if err != nil {
		return err
	}
	got := make([]byte, c.Size())
	if _, err := c.ReadAt(got, 0); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%d bytes of a file are read as another disk", len(file))
	}
	return nil
}

// The writer dies at any byte: what is there has no header, and is no image.
func TestUnfinishedFileIsNoImage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	w, err := qcow2.NewWriter(f, qcow2.WriterOptions{Size: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	b := w.GetBuffer()
	noise(b, 1)
	if err := w.WriteData(0, b); err != nil {
		t.Fatal(err)
	}
	w.Abort()
	if out, err := exec.Command("qemu-img", "info", "-f", "qcow2", path).CombinedOutput(); err == nil {
		t.Errorf("QEMU opens it: %s", out)
	}
	if _, err := openFile(t, path, qcow2.Limits{}); err == nil {
		t.Error("we open it")
	}
	if err := w.Finish(); err == nil {
		t.Error("an aborted image can be finished")
	}
}

func TestHostileImages(t *testing.T) {
	disk := make([]byte, 1<<20)
	noise(disk, 1)
	good := writeImage(t, disk, qcow2.WriterOptions{Backing: "../0/vda.qcow2", Compression: "zstd"})
	u16, u32, u64 := binary.BigEndian.PutUint16, binary.BigEndian.PutUint32, binary.BigEndian.PutUint64
	l1 := binary.BigEndian.Uint64(good[40:])
	l2 := binary.BigEndian.Uint64(good[l1:]) & math.MaxInt64
	refcounts := binary.BigEndian.Uint64(good[48:])
	refcountBlock := binary.BigEndian.Uint64(good[refcounts:])
	data := binary.BigEndian.Uint64(good[l2:]) & math.MaxInt64
	for name, test := range map[string]struct {
		spoil func(p []byte)
		want  string
	}{
		"good":                      {func([]byte) {}, ""},
		"magic":                     {func(p []byte) { p[0]++ }, "not a qcow2"},
		"version 4":                 {func(p []byte) { u32(p[4:], 4) }, "version 4"},
		"cluster bits 8":            {func(p []byte) { u32(p[20:], 8) }, "clusters of 2^8"},
		"cluster bits 22":           {func(p []byte) { u32(p[20:], 22) }, "clusters of 2^22"},
		"cluster bits huge":         {func(p []byte) { u32(p[20:], 1<<31) }, "clusters of"},
		"other size":                {func(p []byte) { u64(p[24:], 1<<21) }, "expected"},
		"encrypted":                 {func(p []byte) { u32(p[32:], 1) }, "encryption"},
		"huge L1":                   {func(p []byte) { u32(p[36:], math.MaxUint32) }, "too big"},
		"short L1":                  {func(p []byte) { u32(p[36:], 0) }, "does not cover"},
		"L1 outside":                {func(p []byte) { u64(p[40:], 1<<30) }, "outside"},
		"L1 negative":               {func(p []byte) { u64(p[40:], math.MaxUint64&^0xffff) }, "not allowed"},
		"L1 in the header":          {func(p []byte) { u64(p[40:], 0) }, "not allowed"},
		"L1 unaligned":              {func(p []byte) { u64(p[40:], l1+8) }, "not allowed"},
		"L1 on the refcount table":  {func(p []byte) { u64(p[40:], refcounts) }, "overlap"},
		"no refcount table":         {func(p []byte) { u32(p[56:], 0) }, "not allowed"},
		"huge refcount table":       {func(p []byte) { u32(p[56:], math.MaxUint32) }, "not allowed"},
		"snapshots":                 {func(p []byte) { u32(p[60:], 1) }, "snapshots"},
		"dirty":                     {func(p []byte) { p[79] |= 1 }, "dirty"},
		"corrupt":                   {func(p []byte) { p[79] |= 2 }, "corrupt"},
		"data file":                 {func(p []byte) { p[79] |= 4 }, "another file"},
		"compression without bit":   {func(p []byte) { p[79] = 0 }, "compression type"},
		"subclusters":               {func(p []byte) { p[79] |= 16 }, "subclusters"},
		"unknown feature":           {func(p []byte) { p[72] = 0x80 }, "unknown incompatible"},
		"refcount order":            {func(p []byte) { u32(p[96:], 7) }, "refcounts of"},
		"header length":             {func(p []byte) { u32(p[100:], 1<<30) }, "header of"},
		"unknown compression":       {func(p []byte) { p[104] = 2 }, "compression type"},
		"data file extension":       {func(p []byte) { u32(p[112:], 0x44415441) }, "extension"},
		"encryption extension":      {func(p []byte) { u32(p[112:], 0x0537be77) }, "extension"},
		"long extension":            {func(p []byte) { u32(p[116:], math.MaxUint32) }, "too long"},
		"backing outside":           {func(p []byte) { u64(p[8:], 65530) }, "backing"},
		"backing huge":              {func(p []byte) { u32(p[16:], math.MaxUint32) }, "backing"},
		"backing in the header":     {func(p []byte) { u64(p[8:], 8) }, "backing"},
		"L2 outside":                {func(p []byte) { u64(p[l1:], 1<<40|1<<63) }, "outside"},
		"L2 on the L1 table":        {func(p []byte) { u64(p[l1:], l1|1<<63) }, "overlaps"},
		"L1 reserved bits":          {func(p []byte) { p[l1] |= 0x40 }, "reserved"},
		"data outside":              {func(p []byte) { u64(p[l2:], 1<<40|1<<63) }, "outside"},
		"data unaligned":            {func(p []byte) { u64(p[l2:], (data+512)|1<<63) }, "not at a cluster"},
		"data twice":                {func(p []byte) { copy(p[l2+8:l2+16], p[l2:l2+8]) }, "on top of"},
		"data on a table":           {func(p []byte) { u64(p[l2:], l2|1<<63) }, "on top of"},
		"data in the header":        {func(p []byte) { u64(p[l2:], 1<<63) }, "host offset 0"},
		"compressed on data":        {func(p []byte) { u64(p[l2+8:], data|1<<62) }, "on top of"},
		"compressed outside":        {func(p []byte) { u64(p[l2:], 1<<40|1<<62) }, "outside"},
		"compressed in the header":  {func(p []byte) { u64(p[l2:], 100|1<<62) }, "not allowed"},
		"entry behind the disk":     {func(p []byte) { u64(p[l2+800:], 1) }, "behind the disk"},
		"refcount 0":                {func(p []byte) { u16(p[refcountBlock+2:], 0) }, "refcount is 0"},
		"refcount block outside":    {func(p []byte) { u64(p[refcounts:], 1<<40) }, "outside"},
		"refcount block is missing": {func(p []byte) { u64(p[refcounts:], 0) }, "refcount is 0"},
	} {
		t.Run(name, func(t *testing.T) {
			p := slices.Clone(good)
			test.spoil(p)
			i, err := qcow2.Open(bytes.NewReader(p), int64(len(p)), qcow2.Limits{Size: 1 << 20})
			if err == nil {
				err = i.Check(t.Context())
			}
			switch {
			case test.want == "" && err != nil:
				t.Error(err)
			case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
				t.Errorf("error is %v, want %q", err, test.want)
			}
		})
	}
}

// qemu-img's own images with what we refuse.
func TestQEMUFeaturesThatAreRefused(t *testing.T) {
	for _, options := range []string{"extended_l2=on", "data_file=DATA", "encrypt.format=aes,encrypt.key-secret=s"} {
		dir := t.TempDir()
		path := filepath.Join(dir, "image")
		options := strings.ReplaceAll(options, "DATA", filepath.Join(dir, "data"))
		run(t, "qemu-img", "create", "-q", "--object", "secret,id=s,data=x", "-f", "qcow2", "-o", options, path, strconv.Itoa(1<<20))
		if _, err := openFile(t, path, qcow2.Limits{}); err == nil {
			t.Errorf("an image with %s is opened", options)
		} else {
			t.Log(err)
		}
	}
}

// Whatever the bytes: an error or an answer, no panic, no huge memory. Run it
// with -fuzzminimizetime 1x: decoders that are pooled make coverage waver.
func FuzzOpen(f *testing.F) {
	// Small clusters make files that a fuzzer gets on with.
	small := filepath.Join(f.TempDir(), "small")
	for _, o := range []string{"cluster_size=512,compat=0.10", "cluster_size=512", "cluster_size=512,compression_type=zstd"} {
		run(f, "qemu-img", "create", "-q", "-f", "qcow2", "-o", o, small, "10k")
		run(f, "qemu-io", "-f", "qcow2", "-c", "write -c 0 512", "-c", "write 1k 1k", small)
		b, err := os.ReadFile(small)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, uint16(0), uint64(0))
	}
	f.Fuzz(func(t *testing.T, b []byte, at uint16, value uint64) {
		b = slices.Clone(b)
		if int(at)+8 <= len(b) && at != 0 {
			binary.BigEndian.PutUint64(b[at:], value)
		}
		i, err := qcow2.Open(bytes.NewReader(b), int64(len(b)), qcow2.Limits{Tables: 1 << 20})
		if err != nil {
			return
		}
		_ = i.Check(t.Context())
		c, err := qcow2.NewChain(i)
		if err != nil {
			return
		}
		size := min(c.Size(), 64<<10)
		_ = c.Extents(0, size, func(_, _ uint64, _ qcow2.Kind) error { return nil })
		_, _ = c.ReadAt(make([]byte, size), 0)
	})
}
