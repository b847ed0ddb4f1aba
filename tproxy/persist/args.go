package persist

import (
	"errors"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// splitArgs cuts the text of a rule into arguments as firewalld does, which is
// shlex.split of Python (firewall/functions.py, splitArgs): quotes of both kinds, and a
// backslash that is itself between single quotes and, between double ones, in front of
// anything but a double quote and another backslash.
func splitArgs(text string) (args []string, err error) {
	var arg strings.Builder
	in, begun := byte(0), false
	for i := 0; i < len(text); i++ {
		c := text[i]
		switch {
		case c == in && in != 0:
			in = 0
		case in == '\'':
			arg.WriteByte(c)
		case c == '\\':
			i++
			if i == len(text) {
				return nil, errors.New("a backslash stands at the end")
			}
			if in != 0 && text[i] != '"' && text[i] != '\\' {
				arg.WriteByte(c)
			}
			arg.WriteByte(text[i])
			begun = true
		case in != 0:
			arg.WriteByte(c)
		case c == '"' || c == '\'':
			in, begun = c, true
		case strings.IndexByte(" \t\r\n", c) < 0:
			arg.WriteByte(c)
			begun = true
		case begun:
			args = append(args, arg.String())
			arg.Reset()
			begun = false
		}
	}
	if in != 0 {
		return nil, errors.New("a quote is not closed")
	}
	if begun {
		args = append(args, arg.String())
	}
	return args, nil
}

// joinArgs is the text that splitArgs cuts into these arguments, with the quotes that
// firewalld's own joinArgs would write.
func joinArgs(args []string) string {
	var b strings.Builder
	for i, a := range args {
		if i > 0 {
			b.WriteByte(' ')
		}
		if a != "" && strings.IndexFunc(a, special) < 0 {
			b.WriteString(a)
			continue
		}
		b.WriteByte('\'')
		b.WriteString(strings.ReplaceAll(a, `'`, `'"'"'`))
		b.WriteByte('\'')
	}
	return b.String()
}

// special reports whether shlex.quote puts quotes around a text with that character.
func special(c rune) bool {
	switch {
	case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		return false
	}
	return !strings.ContainsRune("_@%+=:,./-", c)
}

// restoreLine is the line of iptables-restore that firewalld makes of arguments: it
// puts quotes around what has white space in it, unless that stands between quotes
// already, and escapes nothing (firewall/core/ipXtables.py, set_rules).
func restoreLine(args []string) string {
	var b strings.Builder
	for i, a := range args {
		if i > 0 {
			b.WriteByte(' ')
		}
		if strings.ContainsAny(a, " \t\n\r\v\f") && !(strings.HasPrefix(a, `"`) && strings.HasSuffix(a, `"`)) {
			b.WriteString(`"` + a + `"`)
		} else {
			b.WriteString(a)
		}
	}
	return b.String()
}

// parseArgs reads a rule from its arguments as iptables-restore will. Kuma's installer
// wrote rules of IPv6 as ipv4: such a rule is read too.
func parseArgs(f rules.Family, args []string) (rules.Rule, error) {
	line := "-A A " + restoreLine(args)
	_, r, err := rules.ParseRule(f, line)
	if err != nil {
		_, r, err = rules.ParseRule(0, line)
	}
	return r, err
}

// scriptArgs cuts a line that rules.Set.IPTables rendered into arguments for
// firewalld. What stood between quotes there, a comment, keeps quotes of its own if
// firewalld would take it for an option or for a word of its templates, such as
// %%REJECT%%, or would not escape what is in it.
func scriptArgs(line string) (args []string) {
	for line != "" {
		end := strings.IndexByte(line, ' ')
		if line[0] == '"' {
			end = 1
			for line[end] != '"' {
				if line[end] == '\\' {
					end++
				}
				end++
			}
			end++
			if text := line[1 : end-1]; plain(text) {
				args = append(args, text)
			} else {
				args = append(args, line[:end])
			}
			line = strings.TrimPrefix(line[end:], " ")
			continue
		}
		if end < 0 {
			end = len(line)
		}
		args = append(args, line[:end])
		line = strings.TrimPrefix(line[end:], " ")
	}
	return args
}

// plain reports whether firewalld hands a comment on as it is, whether it calls
// iptables-restore or, with IndividualCalls, iptables.
func plain(text string) bool {
	return text != "" && !strings.ContainsAny(text, `"\`) && text[0] != '-' && text[0] != '%' && text[0] != '!'
}
