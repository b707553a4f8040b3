package repository

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestClaim(t *testing.T) {
	root, ours := newRepository(t)
	theirs := open(t, root, otherKey)
	c, err := ours.Claim(testDomain, idA)
	if err != nil {
		t.Fatal(err)
	}
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := theirs.Claim(testDomain, idB); !errors.Is(err, ErrForeign) || !strings.Contains(err.Error(), name) {
		t.Fatalf("a second host got in: %v", err)
	}
	ownerFile := filepath.Join(root, testDomain, ownerName)
	long := time.Now().Add(-staleAfter - time.Minute)
	if err := os.Chtimes(ownerFile, long, long); err != nil {
		t.Fatal(err)
	}
	if err := c.renew(); err != nil {
		t.Fatal(err)
	}
	if _, err := theirs.Claim(testDomain, idB); !errors.Is(err, ErrForeign) {
		t.Fatalf("a second host got in after a renewal: %v", err)
	}
	if err := os.Chtimes(ownerFile, long, long); err != nil {
		t.Fatal(err)
	}
	d, err := theirs.Claim(testDomain, idB)
	if err != nil {
		t.Fatalf("a dead host's claim is not given up: %v", err)
	}
	if err := errors.Join(c.Check(), c.renew()); !errors.Is(err, ErrForeign) {
		t.Errorf("a lost claim looks good: %v", err)
	}
	s, err := stageFiles(ours, idA)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), c, testManifest(idA, "")); !errors.Is(err, ErrForeign) {
		t.Errorf("committed without a claim: %v", err)
	}
	if err := errors.Join(s.Discard(), c.Release(), d.Check()); err != nil {
		t.Fatal(err)
	}
	if _, err := theirs.Claim(testDomain, idC); err != nil {
		t.Errorf("a host can't take over from its own dead job: %v", err)
	}
	if err := theirs.Discard(testDomain, idC); err != nil {
		t.Fatal(err)
	}
	checkWhole(t, root, ours)
}

func TestCollectLeavesOtherHostsAndLiveJobs(t *testing.T) {
	root, ours := newRepository(t)
	theirs := open(t, root, otherKey)
	if _, err := stageFiles(theirs, idA); err != nil {
		t.Fatal(err)
	}
	if _, err := stageFiles(ours, idB); err != nil {
		t.Fatal(err)
	}
	before := listFiles(t, root)
	if err := ours.Collect(t.Context(), func(b string) bool { return b == idB }); err != nil {
		t.Fatal(err)
	}
	if after := listFiles(t, root); !slices.Equal(before, after) {
		t.Errorf("collected too much: %v", after)
	}
	for _, r := range []*Repository{ours, theirs} {
		if err := r.Collect(t.Context(), func(string) bool { return false }); err != nil {
			t.Fatal(err)
		}
	}
	checkWhole(t, root, ours)
}
