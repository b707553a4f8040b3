package chain

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Retention says which backups of a domain stay in a repository: the newest so
// many, and the newest of each of so many hours, days, weeks, months and years
// that have one. All zero: every one stays.
type Retention struct {
	Last, Hourly, Daily, Weekly, Monthly, Yearly int
}

// Point is a backup as retention sees it.
type Point struct {
	Backup
	// Sequence is the order in which backups were committed. It, and not the
	// clock, says which one is newer: a clock that is set back or forth must not
	// make all there is look old.
	Sequence int64
	Created  time.Time // its point in time, by the clock of that time
	Hold     bool      // somebody wants it to stay
	Base     bool      // the next increment is to build on it
}

// Merge is what becomes of backups that go while one that stays builds on them:
// that one takes over what they hold.
type Merge struct {
	Into string   `json:"into"` // the backup that stays
	Drop []string `json:"drop"` // those that go, the newest first: Into's parent, the parent's parent, …
	Base string   `json:"base"` // the parent of the last of them; "" if that is a full one
}

// RetentionPlan says what becomes of each backup.
type RetentionPlan struct {
	Keep   map[string][]string // by id: why it stays, for people
	Delete [][]string          // ids; each list is one chain's end, the newest first
	Merge  []Merge
}

// Removed returns how many backups go.
func (p RetentionPlan) Removed() int {
	n := 0
	for _, ids := range p.Delete {
		n += len(ids)
	}
	for _, m := range p.Merge {
		n += len(m.Drop)
	}
	return n
}

// AtMost leaves out what would make more than so many go, the oldest first. A
// merge is done whole or not at all, but at least one is done.
func (p RetentionPlan) AtMost(most int) RetentionPlan {
	less := RetentionPlan{Keep: p.Keep}
	for _, ids := range p.Delete {
		if len(ids) > most {
			ids = ids[:most]
		}
		if len(ids) > 0 {
			less.Delete = append(less.Delete, ids)
			most -= len(ids)
		}
	}
	for _, m := range p.Merge {
		if len(m.Drop) > most && less.Removed() > 0 {
			break
		}
		less.Merge = append(less.Merge, m)
		most -= len(m.Drop)
	}
	return less
}

// PlanRetention decides what stays of a domain's backups in one repository. Only
// complete backups go, and never the newest one, nor one that is held, nor one
// on which the next one is to build, or builds what is neither complete nor part
// of the plan. What the clock says decides only which hour, day, … a backup is
// of, in this zone. Which of them are the newest, the order of the backups says:
// so a backup more makes at most as many go as it is of spans of time, however
// the clock jumps, and what was made in a wrong year does not count for ever.
func PlanRetention(points []Point, r Retention, zone *time.Location) RetentionPlan {
	p := RetentionPlan{Keep: map[string][]string{}}
	all := slices.SortedFunc(slices.Values(points), func(a, b Point) int {
		return cmp.Or(cmp.Compare(b.Sequence, a.Sequence), cmp.Compare(b.ID, a.ID))
	})
	complete := slices.DeleteFunc(slices.Clone(all), func(b Point) bool { return b.State != Complete })
	for _, b := range all {
		switch {
		case b.State != Complete:
			p.keep(b.ID, "it is "+string(b.State))
		case b.Hold:
			p.keep(b.ID, "it is held")
		case b.Base:
			p.keep(b.ID, "the next increment builds on it")
		case r == Retention{}:
			p.keep(b.ID, "nothing is removed")
		}
	}
	for i, b := range complete {
		if i < r.Last {
			p.keep(b.ID, fmt.Sprintf("number %d of the newest %d", i+1, r.Last))
		}
	}
	if len(complete) > 0 {
		p.keep(complete[0].ID, "it is the newest")
	}
	for _, span := range spans(r) {
		p.keepOfSpans(complete, span, zone)
	}
	p.remove(all)
	return p
}

func (p *RetentionPlan) keep(id, why string) { p.Keep[id] = append(p.Keep[id], why) }

// span is a length of time of which the newest backup stays.
type span struct {
	name string
	most int
	of   func(time.Time) string // names the span that a time is in
}

func spans(r Retention) []span {
	layout := func(l string) func(time.Time) string { return func(t time.Time) string { return t.Format(l) } }
	week := func(t time.Time) string {
		year, week := t.ISOWeek()
		return fmt.Sprintf("%04d-W%02d", year, week)
	}
	return []span{
		{"hour", r.Hourly, layout("2006-01-02 15h -0700")}, // the zone, for the hour that a change of it brings twice
		{"day", r.Daily, layout("2006-01-02")},
		{"week", r.Weekly, week},
		{"month", r.Monthly, layout("2006-01")},
		{"year", r.Yearly, layout("2006")},
	}
}

func (p *RetentionPlan) keepOfSpans(newestFirst []Point, s span, zone *time.Location) {
	seen := map[string]bool{}
	for _, b := range newestFirst {
		if name := s.of(b.Created.In(zone)); len(seen) < s.most && !seen[name] {
			seen[name] = true
			p.keep(b.ID, fmt.Sprintf("the newest of the %s %s", s.name, name))
		}
	}
}

// remove plans for what nothing keeps. Chains are followed from each end down.
func (p *RetentionPlan) remove(newestFirst []Point) {
	byID, child := map[string]Point{}, map[string]string{}
	for _, b := range newestFirst {
		byID[b.ID] = b
		if b.Parent == "" {
			continue
		}
		if child[b.Parent] != "" { // as after a catalog was lost in the middle of a merge
			p.keep(b.Parent, "several backups build on it")
		}
		child[b.Parent] = b.ID
	}
	goes := func(id string) bool { b, there := byID[id]; return there && len(p.Keep[b.ID]) == 0 }
	for _, b := range slices.Backward(newestFirst) {
		switch {
		case child[b.ID] == "" && goes(b.ID): // an end of a chain
			p.Delete = append(p.Delete, p.down(b.ID, byID, goes))
		case !goes(b.ID) && goes(b.Parent) && b.Kind == Incremental:
			drop := p.down(b.Parent, byID, goes)
			if b.State != Complete {
				for _, id := range drop {
					p.keep(id, fmt.Sprintf("backup %s builds on it, and is %s", b.ID, b.State))
				}
				continue
			}
			p.Merge = append(p.Merge, Merge{Into: b.ID, Drop: drop, Base: byID[drop[len(drop)-1]].Parent})
		}
	}
}

// down returns a backup and those below it, as long as they go.
func (p *RetentionPlan) down(id string, byID map[string]Point, goes func(string) bool) []string {
	var ids []string
	for goes(id) {
		ids = append(ids, id)
		id = byID[id].Parent
	}
	return ids
}
