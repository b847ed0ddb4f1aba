package cni

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
)

// logger makes the log of a command: lines of JSON, one write(2) each, so that those of
// several processes do not mix. The file is opened with the first line.
func (p *Plugin) logger(c *conf, verb string, pod Pod) *slog.Logger {
	out := &lazy{path: c.LogFile, or: p.stderr()}
	log := slog.New(slog.NewJSONHandler(out, &slog.HandlerOptions{Level: c.level})).With("verb", verb)
	if pod.Name != "" {
		log = log.With("pod", pod.Namespace+"/"+pod.Name)
	}
	if pod.ContainerID != "" {
		log = log.With("container", pod.ContainerID)
	}
	return log
}

// lazy opens its file when something is written, or says on standard error why it does
// not.
type lazy struct {
	path string
	or   io.Writer
	once sync.Once
	file *os.File
}

func (l *lazy) Write(line []byte) (int, error) {
	l.once.Do(func() {
		if l.path == "" {
			return
		}
		var err error
		if l.file, err = openLog(l.path); err != nil {
			fmt.Fprintf(l.or, "kuma-cni: the log goes to standard error: %v\n", err)
		}
	})
	if l.file == nil {
		return l.or.Write(line)
	}
	return l.file.Write(line)
}

// openLog opens a file to append to, and nothing that would keep us waiting.
func openLog(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY|nonblock, 0o640)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file", path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
