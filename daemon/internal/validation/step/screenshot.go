package step

import (
	"context"
	"fmt"
	"image"
	"strings"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/validation/screen"
)

// MaxScreenshot is how large a screenshot is at most, in bytes.
const MaxScreenshot = 2 << 20

// screenshot takes a picture of the screen at a time.
type screenshot struct{ at time.Time }

func (screenshot) Name() string { return NameScreenshot }

func (s screenshot) Run(ctx context.Context, g Guest, _ []Finding) Finding {
	png, _, f := s.take(ctx, g)
	f.Screenshot = png
	return f
}

// take waits until it is time, and takes the picture.
func (s screenshot) take(ctx context.Context, g Guest) ([]byte, image.Image, Finding) {
	select {
	case <-ctx.Done():
		return nil, nil, Finding{Verdict: Unable, Cause: ctx.Err().Error()}
	case <-time.After(time.Until(s.at)):
	}
	png, picture, err := take(ctx, g)
	if err != nil {
		return nil, nil, failed(err)
	}
	return png, picture, Finding{Verdict: Valid}
}

func look(ctx context.Context, g Guest) (image.Image, error) {
	data, err := g.Screenshot(ctx)
	if err != nil {
		return nil, err
	}
	return screen.Decode(data)
}

func take(ctx context.Context, g Guest) ([]byte, image.Image, error) {
	picture, err := look(ctx, g)
	if err != nil {
		return nil, nil, err
	}
	png, err := screen.EncodePNG(picture, MaxScreenshot)
	return png, picture, err
}

// judge reads what is on the screen: in the last picture, or in one of its own.
type judge struct{ screenshot }

func (judge) Name() string { return NameJudge }

func (j judge) Run(ctx context.Context, g Guest, before []Finding) Finding {
	var picture image.Image
	png := lastScreenshot(before)
	if png == nil {
		var f Finding
		if png, picture, f = j.take(ctx, g); f.Verdict != Valid {
			return f
		}
	} else {
		var err error
		if picture, err = screen.Decode(png); err != nil {
			return failed(err)
		}
	}
	f := judged(screen.Judge(picture), booted(before))
	f.Screenshot = png
	return f
}

// booted tells whether a step before has proved that the guest is up.
func booted(before []Finding) bool {
	for _, f := range before {
		if f.Verdict == Valid && f.Step != NameScreenshot {
			return true
		}
	}
	return false
}

// judged is the finding on a screen. A guest that is up may blank its screen,
// or have its console elsewhere.
func judged(s screen.Judgement, booted bool) Finding {
	f := Finding{Verdict: Valid, Output: strings.Join(s.Text, "\n")}
	switch {
	case s.Failure != "":
		f.Verdict, f.Cause = NotValid, fmt.Sprintf("the screen says that %s: %q", s.Failure, s.Line)
	case s.Blank && booted:
		f.Verdict, f.Cause = Skipped, "the screen is blank, and the guest agent answered"
	case s.Blank:
		f.Verdict, f.Cause = NotValid, "the screen is blank"
	case s.Firmware && !booted:
		f.Verdict, f.Cause = Unable, "the screen shows only its firmware: whatever that started may have its console elsewhere, or take longer"
	}
	return f
}
