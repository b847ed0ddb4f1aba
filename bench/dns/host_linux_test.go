package main

import (
	"strings"
	"testing"
)

// What dnsperf 2.10 prints at the end.
const said = `Statistics:

  Queries sent:         2000
  Queries completed:    1998 (99.90%)
  Queries lost:         2 (0.10%)

  Response codes:       NOERROR 1998 (100.00%)
  Average packet size:  request 30, response 46
  Run time (s):         0.500012
  Queries per second:   3995.904098

  Average Latency (s):  0.000123 (min 0.000009, max 0.002345)
`

func TestParse(t *testing.T) {
	if s, err := parse(said); err != nil || s != (sample{2000, 2, 3995.904098}) {
		t.Errorf("%+v, %v", s, err)
	}
	for was, is := range map[string]string{
		"NOERROR 1998 (100.00%)":  "NOERROR 1000 (50.05%), REFUSED 998 (49.95%)",
		"Queries lost:         2": "Queries lost:         1",
		"Queries per second":      "Queries",
	} {
		if s, err := parse(strings.Replace(said, was, is, 1)); err == nil {
			t.Errorf("%q: %+v", is, s)
		}
	}
}
