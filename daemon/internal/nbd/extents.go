package nbd

import (
	"context"
	"errors"
	"fmt"
)

// Extents calls fn for the whole range, in order and without gaps;
// neighbours with the same state are merged. It ends with the first error of
// fn. The context must be one of those given to Dial.
func (c *Client) Extents(ctx context.Context, context string, off, length uint64, fn func(Extent) error) error {
	id, ok := c.export.contexts[context]
	if !ok {
		return fmt.Errorf("metadata context %q was not negotiated", context)
	}
	if err := c.checkRange(off, length); err != nil {
		return err
	}
	var pending Extent
	for end := off + length; off < end; {
		extents, err := c.blockStatus(ctx, id, off, end-off)
		if err != nil {
			return fmt.Errorf("cannot get block status (%s) at %d: %w", context, off, err)
		}
		for _, e := range extents {
			e.Length = min(e.Length, end-e.Offset)
			off = e.Offset + e.Length
			if pending.Length > 0 && pending.Flags == e.Flags {
				pending.Length += e.Length
				continue
			}
			if err := emit(pending, fn); err != nil {
				return err
			}
			pending = e
		}
	}
	return emit(pending, fn)
}

func emit(e Extent, fn func(Extent) error) error {
	if e.Length == 0 {
		return nil
	}
	return fn(e)
}

// blockStatus makes one request. What it returns starts at off, has no gaps
// and ends anywhere in (off, off+length]: servers may answer for less.
func (c *Client) blockStatus(ctx context.Context, id uint32, off, length uint64) ([]Extent, error) {
	start, end := c.align(off, min(length, statusSpan))
	r := newRequest(commandBlockStatus, start, uint32(end-start))
	r.context = id
	if err := c.start(ctx, r); err != nil {
		return nil, err
	}
	if err := c.wait(ctx, r); err != nil {
		return nil, err
	}
	if !r.answered {
		return nil, errors.New("server did not answer for this metadata context")
	}
	return clip(r.extents, off, off+length)
}

// clip cuts what lies outside [from, to), as alignment may have widened the
// request, and a server may overrun it with its last extent.
func clip(extents []Extent, from, to uint64) ([]Extent, error) {
	var out []Extent
	for _, e := range extents {
		first, last := max(e.Offset, from), min(e.Offset+e.Length, to)
		if first < last {
			out = append(out, Extent{Offset: first, Length: last - first, Flags: e.Flags})
		}
	}
	if len(out) == 0 {
		return nil, errors.New("server's answer makes no progress")
	}
	return out, nil
}
