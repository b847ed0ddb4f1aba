package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
)

// Names of sources that are no files.
const (
	inline = "--config"
	stdin  = "standard input"
)

// sources reads what the values of --config name.
func (l Loader) sources(values []string) (out []Source, faults []tproxy.ConfigFault) {
	r := &sourceReader{stdin: l.Stdin}
	for _, v := range values {
		r.value(v)
	}
	return r.sources, r.faults
}

type sourceReader struct {
	stdin   io.Reader
	used    bool // whether it was read
	sources []Source
	faults  []tproxy.ConfigFault
}

func (r *sourceReader) fault(value, what, accepted string) {
	r.faults = append(r.faults, tproxy.ConfigFault{Path: "--config", Value: value, What: what, Accepted: accepted})
}

// value reads what a value names: a text, a file, or several with commas between
// them.
func (r *sourceReader) value(v string) {
	trimmed := strings.TrimSpace(v)
	_, err := os.Stat(v)
	switch {
	case trimmed == "": // nothing, as in Kuma
	case trimmed == "-":
		r.standardInput()
	case strings.HasPrefix(trimmed, "{"):
		r.text(v)
	case err == nil:
		r.file(v)
	case strings.Contains(v, "\n"), strings.Contains(v, ": "):
		r.text(v) // as Kuma 2.9 took it
	case strings.Contains(v, ","):
		for part := range strings.SplitSeq(v, ",") {
			r.value(strings.TrimSpace(part))
		}
	default:
		r.file(v)
	}
}

func (r *sourceReader) text(v string) {
	r.sources = append(r.sources, Source{inline, []byte(v)})
}

func (r *sourceReader) standardInput() {
	switch {
	case r.used:
		r.fault("-", "is given twice", "standard input once")
		return
	case r.stdin == nil:
		r.fault("-", "cannot be read (there is no standard input)", acceptedFile)
		return
	}
	r.used = true
	text, err := atMost(r.stdin)
	if err != nil {
		r.fault("-", "cannot be read ("+err.Error()+")", acceptedFile)
		return
	}
	r.sources = append(r.sources, Source{stdin, text})
}

const acceptedFile = "a file of YAML or JSON, or - for standard input"

func (r *sourceReader) file(path string) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		r.fault(path, "does not exist", acceptedFile)
		return
	case err != nil:
		r.fault(path, "cannot be read ("+reason(err)+")", acceptedFile)
		return
	case info.IsDir():
		r.fault(path, "is a directory", acceptedFile)
		return
	case !info.Mode().IsRegular(): // one could wait for a FIFO for ever
		r.fault(path, "is no regular file", acceptedFile)
		return
	}
	f, err := os.Open(path)
	if err != nil {
		r.fault(path, "cannot be read ("+reason(err)+")", acceptedFile)
		return
	}
	defer f.Close()
	text, err := atMost(f)
	if err != nil {
		r.fault(path, "cannot be read ("+reason(err)+")", acceptedFile)
		return
	}
	r.sources = append(r.sources, Source{path, text})
}

// reason leaves the path out of an error, which is quoted already.
func reason(err error) string {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		err = e.Err
	}
	return err.Error()
}

// atMost reads a document, and what is too long for one just far enough to tell.
func atMost(r io.Reader) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxDocument+1))
	if err == nil && len(text) > maxDocument {
		err = fmt.Errorf("it is longer than %d bytes", maxDocument)
	}
	return text, err
}
