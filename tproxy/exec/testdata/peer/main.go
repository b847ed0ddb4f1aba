// Peer is what runs in the containers of TestPodmanPod: whoever answers says its name.
//
//	peer wait                     waits to be ended
//	peer serve tcp:NAME:PORT ...  answers at the port with the name; udp: on loopback
//	peer ask tcp|udp ADDRESS ...  prints who answered, a line each
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
)

func main() {
	switch args := os.Args[1:]; {
	case len(args) > 2 && args[0] == "ask":
		for ; len(args) > 2; args = args[2:] {
			fmt.Println(ask(args[1], args[2]))
		}
	case len(args) > 1 && args[0] == "serve":
		for _, a := range args[1:] {
			p := strings.Split(a, ":")
			if err := serve(p[0], p[1], p[2]); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}
		fmt.Println("serving")
		fallthrough
	default:
		time.Sleep(10 * time.Minute) // nothing is left of a test that was killed
	}
}

func serve(network, name, port string) error {
	if network == "tcp" {
		l, err := net.Listen("tcp", ":"+port)
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, name)
				_ = c.Close()
			}
		}()
		return nil
	}
	// A socket of all addresses would answer from another than was asked.
	for _, host := range []string{"127.0.0.1", "::1"} {
		c, err := net.ListenPacket("udp", net.JoinHostPort(host, port))
		if err != nil {
			return err
		}
		go func() {
			buf := make([]byte, 512)
			for {
				_, from, err := c.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = c.WriteTo([]byte(name), from)
			}
		}()
	}
	return nil
}

func ask(network, address string) string {
	c, err := net.DialTimeout(network, address, 3*time.Second)
	if err != nil {
		return "nobody: " + err.Error()
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(3 * time.Second))
	if network == "udp" {
		if _, err := io.WriteString(c, "who"); err != nil {
			return "nobody: " + err.Error()
		}
	}
	buf := make([]byte, 64)
	n, err := c.Read(buf)
	if err != nil {
		return "nobody: " + err.Error()
	}
	return string(buf[:n])
}
