package transfer

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestWaited counts the time in which there are requests, however many.
func TestWaited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r requests
		is := func(want time.Duration) {
			t.Helper()
			if got := r.waited(); got != want {
				t.Errorf("%v instead of %v", got, want)
			}
		}
		time.Sleep(time.Second)
		is(0)
		first := r.begin()
		time.Sleep(time.Second)
		second := r.begin()
		time.Sleep(time.Second)
		is(2 * time.Second)
		first()
		time.Sleep(time.Second)
		is(3 * time.Second)
		second()
		time.Sleep(time.Second)
		is(3 * time.Second)
		r.begin()()
		is(3 * time.Second)
	})
}
