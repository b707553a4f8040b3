package transfer

import (
	"os"

	"golang.org/x/sys/unix"
)

// writebackStep is after how many bytes the kernel is asked again.
const writebackStep = 8 << 20

// writeback is a file that is written from its beginning to its end. It has the
// kernel begin at once to bring to storage what was written: by itself, it
// would keep gigabytes in memory, and storage would idle until the file is
// synced. The writer does not wait for it.
type writeback struct {
	*os.File
	asked int64 // the kernel was asked to bring to storage what is before
	parts chan part
	ended chan struct{}
}

type part struct{ off, length int64 }

func newWriteback(f *os.File) *writeback {
	w := &writeback{File: f, parts: make(chan part), ended: make(chan struct{})}
	go func() {
		defer close(w.ended)
		for p := range w.parts {
			// Advice, which not every file system takes: what fails, fails again when the file is synced.
			_ = unix.SyncFileRange(int(f.Fd()), p.off, p.length, unix.SYNC_FILE_RANGE_WRITE)
		}
	}()
	return w
}

// WriteAt implements io.WriterAt.
func (w *writeback) WriteAt(p []byte, off int64) (int, error) {
	n, err := w.File.WriteAt(p, off)
	if end := off + int64(n); end-w.asked >= writebackStep {
		select {
		case w.parts <- part{w.asked, end - w.asked}:
			w.asked = end
		default: // storage is busy: more with the next
		}
	}
	return n, err
}

// stop ends it, and leaves the file open.
func (w *writeback) stop() {
	close(w.parts)
	<-w.ended
}
