package persist_test

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/persist"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

func set(t testing.TB, c tproxy.Config) rules.Set {
	t.Helper()
	p, err := tproxy.Build(c, tproxy.Host{})
	if err != nil {
		t.Fatal(err)
	}
	return p.WithRecord(tproxy.Record{Version: "v0.1.0"})
}

func merge(t rapid.TB, file []byte, s rules.Set) []byte {
	t.Helper()
	out, err := persist.MergeDirect(file, s)
	if err != nil {
		t.Fatalf("merge into %q: %v", file, err)
	}
	return out
}

func remove(t rapid.TB, file []byte) ([]byte, persist.Removal) {
	t.Helper()
	out, r, err := persist.RemoveDirect(file)
	if err != nil {
		t.Fatalf("removal from %q: %v", file, err)
	}
	return out, r
}

// identical is about bytes, and about nil, which is no file.
func identical(a, b []byte) bool { return bytes.Equal(a, b) && (a == nil) == (b == nil) }

const foreign = `<rule ipv="ipv4" table="nat" chain="OUTPUT" priority="0">-p tcp -m comment --comment "KUMA_MESH_OUTBOUND" -j ACCEPT</rule>`

func TestMergeThenRemoveIsIdentity(t *testing.T) {
	s := set(t, tproxy.Config{})
	for name, file := range map[string]string{
		"empty":             "",
		"blank":             " \r\n",
		"byte order mark":   "\ufeff<direct>\n</direct>\n",
		"declaration alone": "<?xml version='1.0'?>\n<!-- nothing -->",
		"Kuma's":            `<?xml version="1.0" encoding="UTF-8"?>` + "\n<direct></direct>",
		"closed":            "<direct/>",
		"closed, spaces":    "<?xml version=\"1.0\" encoding='utf-8'?><direct\n  /><!-- end -->\n",
		"open":              "<direct>\n</direct >\n",
		"carriage returns":  "<direct>\r\n  " + foreign + "\r\n</direct>\r\n",
		"document type":     "<!DOCTYPE direct>\n<direct>" + foreign + "</direct>",
		"entities":          `<direct><rule ipv="ipv&#52;" table="&#x6e;at" chain="A&amp;B" priority=" +1_0 ">-m comment --comment &quot;&lt;a b&gt;&quot;</rule></direct>`,
		"no arguments":      `<direct><rule ipv="eb" table="broute" chain="BROUTING" priority="0"/><passthrough ipv="eb"/><chain ipv="ipv6" table="raw" chain="X">text</chain>text</direct>`,
	} {
		text := []byte(file)
		merged := merge(t, text, s)
		rest, r := remove(t, merged)
		if !identical(rest, text) || r.Rewritten {
			t.Errorf("%s: %q became %q; rewritten %t", name, text, rest, r.Rewritten)
		}
		if r.Empty != !strings.Contains(file, "ipv") {
			t.Errorf("%s: empty %t", name, r.Empty)
		}
		if strings.Count(string(merged), "\r\n") > 0 && strings.Count(string(merged), "\r\n") != strings.Count(string(merged), "\n") {
			t.Errorf("%s: two kinds of line end:\n%q", name, merged)
		}
	}
	merged := merge(t, nil, s)
	if rest, r := remove(t, merged); rest != nil || !r.Empty || r.Rewritten {
		t.Errorf("a file that was not there became %q, %+v", rest, r)
	}
	if !bytes.HasPrefix(merged, []byte("<?xml version=\"1.0\" encoding=\"utf-8\"?>\n")) || !bytes.HasSuffix(merged, []byte("-->\n")) {
		t.Errorf("a new file:\n%s", merged)
	}
	if none := merge(t, []byte("<direct/>"), rules.Set{}); string(none) != "<direct/>" {
		t.Errorf("a Set without rules: %q", none)
	}
}

// A table of edits that others make after a merge.
func TestOthersEditTheFile(t *testing.T) {
	s := set(t, tproxy.Config{})
	before := "<direct>\n  " + foreign + "\n</direct>\n"
	merged := string(merge(t, []byte(before), s))
	mine := "  " + strings.Replace(foreign, "-j ACCEPT", "-j DROP", 1) + "\n"
	first := merged[strings.Index(merged, "  <chain"):]
	first = first[:strings.Index(first, "\n")+1]
	lines := strings.SplitAfter(merged, "\n")
	for name, c := range map[string]struct {
		file, want string
		rewritten  bool
	}{
		"a rule in front":        {strings.Replace(merged, "<direct>\n", "<direct>\n"+mine, 1), strings.Replace(before, "<direct>\n", "<direct>\n"+mine, 1), false},
		"a rule behind":          {strings.Replace(merged, "</direct>", "\n"+mine+"</direct>", 1), strings.Replace(before, "</direct>", "\n"+mine+"</direct>", 1), false},
		"a rule among ours":      {strings.Replace(merged, first, first+mine, 1), strings.Replace(before, "</direct>", mine+"</direct>", 1), true},
		"a chain of ours gone":   {strings.Replace(merged, first, "", 1), before, false},
		"a priority":             {strings.Replace(merged, `priority="10000"`, `priority="1"`, 1), before, false},
		"other quotes":           {strings.Replace(merged, `priority="10000"`, `priority='10000'`, 1), strings.Replace(before, "</direct>", "</direct>", 1), true},
		"the first mark is gone": {strings.Replace(merged, lines[2], "", 1), before, true},
		"a rule in our chain":    {strings.Replace(merged, "<direct>\n", "<direct>\n"+`  <rule ipv="ipv4" table="nat" chain="KUMA_MESH_INBOUND" priority="99">-j ACCEPT</rule>`+"\n", 1), before, true},
	} {
		if c.file == merged {
			t.Fatalf("%s: nothing was edited", name)
		}
		rest, r := remove(t, []byte(c.file))
		if string(rest) != c.want || r.Rewritten != c.rewritten {
			t.Errorf("%s: rewritten %t\n%s", name, r.Rewritten, cmp.Diff(c.want, string(rest)))
		}
		again := merge(t, []byte(c.file), s)
		if !bytes.Equal(merge(t, again, s), again) {
			t.Errorf("%s: merged twice, it is not as merged once", name)
		}
	}
	// In a file that was new, and in <direct/>, what others add keeps its root.
	for _, file := range [][]byte{nil, {}, []byte("<direct/>")} {
		merged := bytes.Replace(merge(t, file, s), []byte("</direct>"), []byte(mine+"</direct>"), 1)
		rest, _ := remove(t, merged)
		d, err := persist.ReadDirect(rest)
		if err != nil || len(d.Entries) != 1 || d.Entries[0].Owner != persist.Others {
			t.Errorf("%q: %v, %v", rest, d, err)
		}
	}
}

func TestErrors(t *testing.T) {
	s := set(t, tproxy.Config{})
	merged := string(merge(t, []byte("<direct>\n</direct>\n"), s))
	chain := `<chain ipv="ipv4" table="nat" chain="KUMA_MESH_INBOUND"/>`
	for file, want := range map[string]string{
		"nonsense":           "direct.xml line 1, column 1: text outside",
		"<direct>":           "direct.xml line 1, column 9: not XML that firewalld reads: unexpected EOF",
		"<direct>\n  <a":     "direct.xml line 2, column 5: not XML",
		"\xff\xfe<\x00d\x00": "direct.xml line 1, column 3: not XML that firewalld reads: invalid UTF-8",
		"<zone/>":            `direct.xml line 1, column 1: unknown element "zone"`,
		"<chain ipv='ipv4' table='nat' chain='A'/>":                                        `the root is "chain"`,
		"<direct/>\n<direct/>":                                                             "direct.xml line 2, column 1: a second root",
		"<direct/>\nx":                                                                     "text outside",
		"<direct>\n  é <zone/></direct>":                                                   `direct.xml line 2, column 5: unknown element "zone"`,
		"<direct><direct/></direct>":                                                       `element "direct" within another`,
		"<direct a='b'/>":                                                                  `unknown attribute "a" of direct`,
		"<direct xmlns='a'/>":                                                              `unknown element "direct"`,
		"<direct><passthrough ipv='ip'/></direct>":                                         `ipv "ip"`,
		"<direct><passthrough ipv='ipv4' ipv='ipv4'/></direct>":                            "stands twice",
		"<direct><passthrough ipv='ipv4'>'</passthrough></direct>":                         "a quote is not closed",
		"<direct><chain ipv='ipv4' table='nat'/></direct>":                                 "chain has no attribute chain",
		"<direct><chain ipv='ipv4' table='broute' chain='A'/></direct>":                    `table "broute"`,
		"<direct><rule ipv='ipv4' table='nat' chain='A' priority='a'/></direct>":           `priority "a"`,
		"<direct><rule ipv='ipv4' table='nat' chain='A' priority='0'><b/></rule></direct>": `unknown element "b"`,
		"<?xml version='1.0' encoding='latin1'?><direct/>":                                 "not in UTF-8",
		"\n<?xml version='1.0'?><direct/>":                                                 "stands first",
		"<!DOCTYPE direct [<!ENTITY a 'b'>]><direct/>":                                     "document type",
		strings.Replace(merged, "<direct>\n", "<direct>\n"+chain+"\n", 1):                  "direct.xml line 2, column 1: the chain KUMA_MESH_INBOUND is of ours and stands here a second time",
		"<direct>" + strings.Repeat("\n", 9) + "<rule ipv='ipv4' table='nat' chain='OUTPUT' priority='-2147483648'>-j ACCEPT</rule></direct>": "direct.xml line 10, column 1: priority -2147483648 leaves no room",
		"<direct><rule ipv='ipv6' table='nat' chain='PREROUTING' priority='2147483647'>-j ACCEPT</rule></direct>":                             "leaves no room",
		"<direct><rule ipv='ipv6' table='nat' chain='PREROUTING' priority='99999999999999999999'/></direct>":                                  "is no number",
	} {
		out, err := persist.MergeDirect([]byte(file), s)
		if _, ok := err.(*persist.DirectError); !ok || out != nil || !strings.Contains(err.Error(), want) { //nolint:errorlint // exactly this type
			t.Errorf("%q: %v, want %s", file, err, want)
		}
	}
	// A rule of others needs a chain that goes.
	for _, e := range []string{
		`<rule ipv="ipv4" table="nat" chain="OUTPUT" priority="7">-p tcp --dport 1 -g KUMA_MESH_OUTBOUND</rule>`,
		`<passthrough ipv="ipv4">-t nat -A MINE -j KUMA_MESH_OUTBOUND</passthrough>`,
	} {
		file := strings.Replace(merged, "<direct>\n", "<direct>\n"+e, 1)
		out, r, err := persist.RemoveDirect([]byte(file))
		if err == nil || out != nil || len(r.Removed) > 0 || !strings.Contains(err.Error(), "line 2, column 1: a ") {
			t.Errorf("%s: %v", e, err)
		}
		merge(t, []byte(file), s) // which keeps the chain
	}
	// What could not be found again, and what is not valid.
	for want, s := range map[string]rules.Set{
		"ipv4 nat chain MINE is not of tproxy.Known": {Chains: []rules.Chain{{Table: rules.NAT, Name: "MINE"}}},
		"is not of tproxy.Known":                     {Bases: []rules.BaseChain{{Table: rules.NAT, Hook: rules.Output, Rules: []rules.Rule{{Action: rules.Accept{}}}}}},
		"no action":                                  {Bases: []rules.BaseChain{{Table: rules.NAT, Hook: rules.Output, Rules: []rules.Rule{{}}}}},
	} {
		if _, err := persist.MergeDirect(nil, s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

// kumasEntries are those of Kuma's --store-firewalld, in its order.
const kumasEntries = `  <chain ipv="ipv4" table="nat" chain="KUMA_MESH_INBOUND"></chain>
  <chain ipv="ipv4" table="nat" chain="KUMA_MESH_OUTBOUND"></chain>
  <chain ipv="ipv4" table="nat" chain="KUMA_MESH_INBOUND_REDIRECT"></chain>
  <chain ipv="ipv4" table="nat" chain="KUMA_MESH_OUTBOUND_REDIRECT"></chain>
  <rule ipv="ipv4" table="nat" chain="PREROUTING" priority="3">-p tcp -j KUMA_MESH_INBOUND</rule>
  <rule ipv="ipv4" table="nat" chain="OUTPUT" priority="3">-p udp --dport 53 -m owner --uid-owner 5678 -j RETURN</rule>
  <rule ipv="ipv4" table="nat" chain="OUTPUT" priority="3">-p udp --dport 53 -j REDIRECT --to-ports 15053</rule>
  <rule ipv="ipv4" table="nat" chain="OUTPUT" priority="3">-p udp --dport 53 -d fd00::53/128 -j REDIRECT --to-ports 15053</rule>
  <rule ipv="ipv4" table="nat" chain="OUTPUT" priority="3">-p tcp -j KUMA_MESH_OUTBOUND</rule>
  <rule ipv="ipv4" table="nat" chain="KUMA_MESH_INBOUND" priority="3">-p tcp -j KUMA_MESH_INBOUND_REDIRECT</rule>
  <rule ipv="ipv4" table="nat" chain="KUMA_MESH_OUTBOUND" priority="3">-s 127.0.0.6/32 -o lo -j RETURN</rule>
  <rule ipv="ipv4" table="nat" chain="KUMA_MESH_OUTBOUND" priority="3">-s ::6/128 -o lo -j RETURN</rule>
  <rule ipv="ipv4" table="nat" chain="KUMA_MESH_OUTBOUND" priority="3">-m owner --uid-owner 5678 -j RETURN</rule>
  <rule ipv="ipv4" table="nat" chain="KUMA_MESH_OUTBOUND" priority="3">-p tcp --dport 53 -j REDIRECT --to-ports 15053</rule>
  <rule ipv="ipv4" table="nat" chain="KUMA_MESH_OUTBOUND" priority="3">-d 127.0.0.1/32 -j RETURN</rule>
  <rule ipv="ipv4" table="nat" chain="KUMA_MESH_OUTBOUND" priority="3">-j KUMA_MESH_OUTBOUND_REDIRECT</rule>
  <rule ipv="ipv4" table="nat" chain="KUMA_MESH_INBOUND_REDIRECT" priority="3">-p tcp -j REDIRECT --to-ports 15006</rule>
  <rule ipv="ipv4" table="nat" chain="KUMA_MESH_OUTBOUND_REDIRECT" priority="3">-p tcp -j REDIRECT --to-ports 15001</rule>
`

// K8: what Kuma's installer wrote when it wrote something (testdata of its firewalld
// package), with an IPv6 rule as ipv4, goes; rules of others beside it stay.
func TestKumasEntriesGo(t *testing.T) {
	kumas := kumasEntries
	head, foot := "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<direct>\n", "</direct>"
	others := "  " + foreign + "\n" + `  <chain ipv="ipv4" table="nat" chain="KUMA_MESH_MINE"/>
  <rule ipv="ipv4" table="nat" chain="OUTPUT" priority="9">-p udp --dport 5353 -d fd00::53/128 -j REDIRECT --to-ports 5354</rule>
  <passthrough ipv="ipv4">-t nat -A KUMA_MESH_MINE -j RETURN</passthrough>
`
	rest, r := remove(t, []byte(head+kumas+others+foot))
	if string(rest) != head+others+foot || !r.Rewritten || r.Empty {
		t.Errorf("%+v\n%s", r, cmp.Diff(head+others+foot, string(rest)))
	}
	if n := strings.Count(kumas, "\n"); len(r.Removed) != n || !slices.Contains(r.Kuma, "ipv4 nat OUTPUT") {
		t.Errorf("%d of %d removed, out of %q", len(r.Removed), n, r.Kuma)
	}
	s := set(t, tproxy.Config{})
	if rest, _ := remove(t, merge(t, []byte(head+kumas+others+foot), s)); string(rest) != head+others+foot {
		t.Errorf("after a merge:\n%s", rest)
	}
	// The empty file that its last versions wrote is recognised, and not changed.
	if rest, r := remove(t, []byte(head+foot)); string(rest) != head+foot || !r.Empty || r.Rewritten {
		t.Errorf("%q, %+v", rest, r)
	}
	// What it may have written, and anybody else as well, stays and is named.
	invalid := `  <rule ipv="ipv4" table="mangle" chain="PREROUTING" priority="3">-m conntrack --ctstate INVALID -j DROP</rule>` + "\n"
	rest, r = remove(t, []byte(head+kumas+invalid+foot))
	if len(r.Doubtful) != 1 || string(rest) != head+invalid+foot || r.Empty {
		t.Errorf("doubtful %v\n%s", r.Doubtful, rest)
	}
}

// K8, wherever Kuma's entries stand in a file: a merge and a removal leave what a removal
// alone does, and that is what others have in it.
func TestMergeOverKumasEntries(t *testing.T) {
	kumas := strings.SplitAfter(strings.TrimSpace(kumasEntries), "\n")
	rapid.Check(t, func(t *rapid.T) {
		file, s := string(drawFile(t)), drawSet(t)
		end := strings.LastIndex(file, "</direct>")
		if end < 0 {
			t.Skip("no place for them")
		}
		// Kuma's own writer has its entries in one piece, in its order.
		with := file[:end] + "\n" + strings.Join(kumas[:rapid.IntRange(4, len(kumas)).Draw(t, "entries")], "") + "\n" + file[end:]
		alone, r, err := persist.RemoveDirect([]byte(with))
		if err != nil {
			t.Skip("others need a chain of Kuma's")
		}
		if len(r.Removed) < 4 || bytes.Contains(alone, []byte("KUMA_MESH_INBOUND_REDIRECT")) {
			t.Fatalf("%d entries went, and left %q", len(r.Removed), alone)
		}
		merged := merge(t, []byte(with), s)
		if again := merge(t, merged, s); !bytes.Equal(again, merged) {
			t.Fatalf("merged twice, it is not as merged once: %q", again)
		}
		if rest, r := remove(t, merged); !identical(rest, alone) || r.Rewritten {
			t.Fatalf("%q became %q, and without a merge %q", with, rest, alone)
		}
		before, err := persist.ReadDirect([]byte(file))
		if err != nil {
			t.Fatal(err)
		}
		after, err := persist.ReadDirect(alone)
		if err != nil {
			t.Fatal(err)
		}
		var was, is []string
		for _, e := range before.Entries {
			was = append(was, e.String())
		}
		for _, e := range after.Entries {
			is = append(is, e.String())
		}
		if !slices.Equal(was, is) {
			t.Fatalf("entries of others: %s", cmp.Diff(was, is))
		}
	})
}

// hostile are reasons and interfaces that try to break out of XML, of shlex, of the
// line that firewalld makes, or to be one of its template words.
var hostile = []string{`"`, `\`, `'`, `a "b" c`, `it's`, `</rule><rule>`, `]]>`, `--> <!--`, `&amp;`, `&#10;`, "%%REJECT%%", "%%ICMP%%", "--table", "-t", "-s", "-d a,b", `"-j ACCEPT"`, `" -j ACCEPT "`, `\" -j ACCEPT`, "!", " ", " a ", "$(id)", "`id`", "#"}

func drawSet(t *rapid.T) rules.Set {
	cfg := tproxytest.Configs().Draw(t, "config")
	p, err := tproxy.Build(cfg, tproxytest.Hosts(cfg).Draw(t, "host"))
	if err != nil {
		t.Skip(err)
	}
	s := p.WithRecord(tproxy.Record{Version: "v0.1.0"})
	for i := range s.Chains {
		if c := &s.Chains[i]; len(c.Rules) > 0 && !tproxy.IsRecord(c.Table, c.Name) && rapid.Bool().Draw(t, "hostile") {
			c.Rules = slices.Clone(c.Rules)
			c.Rules[0].Why = rapid.SampledFrom(hostile).Draw(t, "reason")
		}
	}
	return s
}

// drawFile draws a direct.xml as nobody would write it.
func drawFile(t *rapid.T) []byte {
	of := func(label string, from ...string) string { return rapid.SampledFrom(from).Draw(t, label) }
	space := func() string { return of("space", "", "", " ", "\n", "\n\n  ", "\t", "<!-- a > \n'b' -->", "<?pi a?>") }
	quoted := func(name, value string) string {
		q := of("quote", `"`, `'`)
		return of("gap", " ", "\n", "  ") + name + of("equals", "=", " = ") + q + value + q
	}
	var b strings.Builder
	b.WriteString(of("start", "", "\ufeff"))
	b.WriteString(of("declaration", "", `<?xml version="1.0"?>`, `<?xml version='1.0' encoding='UTF-8'?>`))
	b.WriteString(space())
	switch of("root", "open", "open", "open", "open", "closed", "none") {
	case "none":
		return []byte(b.String())
	case "closed":
		b.WriteString("<direct" + of("gap", "", " ", "\n") + "/>" + space())
		return []byte(b.String())
	}
	b.WriteString("<direct" + of("gap", "", " ") + ">")
	for range rapid.IntRange(0, 6).Draw(t, "entries") {
		b.WriteString(space())
		ipv := quoted("ipv", of("ipv", "ipv4", "ipv6"))
		args := of("arguments", "-j ACCEPT", "-p tcp --dport 1 -j DROP", `-m comment --comment "a 'KUMA_MESH_INBOUND' b"`, "<![CDATA[ -i a&b ]]>", "-m comment --comment a&lt;b", "", " -s a,b\n", `\'`, "a<!-- 1 -->b", "-j é")
		switch of("kind", "chain", "rule", "rule", "passthrough") {
		case "chain":
			b.WriteString("<chain" + ipv + quoted("table", "nat") + quoted("chain", of("chain", "A", "B&amp;", "KUMA_MESH", "OUTPUT")))
			b.WriteString(of("end", "/>", "></chain>", "> </chain\n>"))
		case "rule":
			p := fmt.Sprint(rapid.OneOf(rapid.IntRange(-3, 3), rapid.IntRange(-20000, 20000)).Draw(t, "priority"))
			b.WriteString("<rule" + quoted("priority", p) + quoted("chain", of("chain", "A", "OUTPUT", "PREROUTING", "OUTPUT_direct")) + quoted("table", of("table", "nat", "raw")) + ipv)
			b.WriteString(">" + args + "</rule>")
		default:
			b.WriteString("<passthrough" + ipv + ">" + args + "</passthrough>")
		}
	}
	b.WriteString(space() + "</direct>" + space())
	text := b.String()
	if rapid.Bool().Draw(t, "carriage returns") {
		text = strings.ReplaceAll(text, "\n", "\r\n")
	}
	return []byte(text)
}

// loaded does with a file what firewalld does, written again after
// firewall/core/io/direct.py and fw_direct.py: each rule is inserted at the number that
// those of its chain with a lower or equal priority make.
func loaded(t rapid.TB, file []byte, ipv string) rules.Set {
	t.Helper()
	var doc struct {
		Chains []struct {
			IPv   string `xml:"ipv,attr"`
			Table string `xml:"table,attr"`
			Chain string `xml:"chain,attr"`
		} `xml:"chain"`
		Rules []struct {
			IPv      string `xml:"ipv,attr"`
			Table    string `xml:"table,attr"`
			Chain    string `xml:"chain,attr"`
			Priority int    `xml:"priority,attr"`
			Text     string `xml:",chardata"`
		} `xml:"rule"`
	}
	if err := xml.Unmarshal(file, &doc); err != nil {
		t.Fatal(err)
	}
	type key struct{ table, chain string }
	chains, priorities := map[key][]string{}, map[key][]int{}
	tables := map[string][]key{}
	for _, c := range doc.Chains {
		if c.IPv == ipv {
			k := key{c.Table, c.Chain}
			tables[c.Table] = append(tables[c.Table], k)
			chains[k] = nil
		}
	}
	for _, r := range doc.Rules {
		if r.IPv != ipv {
			continue
		}
		k := key{r.Table, r.Chain}
		if slices.Contains(priorities[k], r.Priority) && strings.Contains(r.Text, "kuma/mesh/transparent/proxy/") {
			t.Errorf("priority %d stands twice in %v", r.Priority, k)
		}
		if _, ok := chains[k]; !ok {
			tables[r.Table] = append(tables[r.Table], k)
		}
		at := 0
		for _, p := range priorities[k] {
			if p <= r.Priority {
				at++
			}
		}
		priorities[k] = slices.Insert(priorities[k], at, r.Priority)
		chains[k] = slices.Insert(chains[k], at, persist.FirewalldLine(t, r.Text))
	}
	var b strings.Builder
	for table, keys := range tables {
		b.WriteString("*" + table + "\n")
		for _, k := range keys {
			if !slices.Contains([]string{"OUTPUT", "PREROUTING"}, k.chain) {
				b.WriteString(":" + k.chain + " - [0:0]\n")
			}
		}
		for _, k := range keys {
			for _, line := range chains[k] {
				b.WriteString("-A " + k.chain + " " + line + "\n")
			}
		}
		b.WriteString("COMMIT\n")
	}
	f := map[string]rules.Family{"ipv4": rules.IPv4, "ipv6": rules.IPv6}[ipv]
	s, err := rules.ParseSave(f, []byte(b.String()))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func checkIdentity(t *rapid.T) {
	file, s := drawFile(t), drawSet(t)
	merged := merge(t, file, s)
	if again := merge(t, merged, s); !bytes.Equal(again, merged) {
		t.Fatalf("merged twice, it is not as merged once: %q, %q", merged, again)
	}
	other := drawSet(t)
	if got, want := merge(t, merged, other), merge(t, file, other); !bytes.Equal(got, want) {
		t.Fatalf("another Set in its place: %q, want %q", got, want)
	}
	rest, r := remove(t, merged)
	if !identical(rest, file) || r.Rewritten {
		t.Fatalf("%q became %q", file, rest)
	}
	before, err := persist.ReadDirect(file)
	if err != nil {
		t.Fatal(err)
	}
	after, err := persist.ReadDirect(merged)
	if err != nil {
		t.Fatal(err)
	}
	i := 0
	for _, e := range after.Entries {
		if e.Owner == persist.Others && e.String() != before.Entries[i].String() {
			t.Fatalf("%s is %s", before.Entries[i], e)
		} else if e.Owner == persist.Others {
			i++
			continue
		}
		// First and last among the direct rules of a built-in chain.
		base, ok := s.Base(rules.Table(e.Table), rules.Hook(e.Chain))
		for _, o := range after.Entries {
			if ok && o.Owner == persist.Others && o.Kind == e.Kind && o.IPv == e.IPv && o.Table == e.Table && o.Chain == e.Chain &&
				(base.Place == rules.First) != (e.Priority < o.Priority) {
				t.Fatalf("%s and %s", e, o)
			}
		}
	}
	if i != len(before.Entries) {
		t.Fatalf("%d of %d entries of others", i, len(before.Entries))
	}
	for _, f := range rules.Families() {
		if changes := rules.Compare(f, after.Rules(f), s); changes != nil {
			t.Fatal(changes)
		}
	}
}

func TestMergeProperties(t *testing.T) { rapid.Check(t, checkIdentity) }

func FuzzMerge(f *testing.F) { f.Fuzz(rapid.MakeFuzz(checkIdentity)) }

// A reader that sorts by priority loads the plan's order, whatever the plan says.
func TestLoadedIsThePlansOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawSet(t)
		merged := merge(t, []byte("<direct>"+foreign+"</direct>"), s)
		for i, f := range rules.Families() {
			live := loaded(t, merged, []string{"ipv4", "ipv6"}[i])
			ours, references := live.Ours(f, tproxy.Known())
			if changes := rules.Compare(f, ours, s); changes != nil || len(references) > 0 {
				t.Fatal(changes, references)
			}
			for _, c := range live.Bases {
				for i, r := range c.Rules {
					if r.Why == "KUMA_MESH_OUTBOUND" && i != len(c.Rules)-1 {
						t.Fatalf("a rule of others is number %d of %d", i+1, len(c.Rules))
					}
				}
			}
		}
	})
}

// Rules have room in front of them and behind, unless others go further; the order of
// the file is nothing to who reads it.
func TestPriorities(t *testing.T) {
	s := set(t, tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}})
	for others, want := range map[string][]int{ // OUTPUT, PREROUTING
		"":                               {-10000, -9999, 10000},
		"OUTPUT -9999 PREROUTING 9999":   {-10001, -10000, 10000},
		"OUTPUT -9998 PREROUTING 10000":  {-10000, -9999, 10001},
		"OUTPUT 70000 PREROUTING -70000": {-10000, -9999, 10000},
		"PREROUTING 2147483646 OUTPUT -2147483646": {-2147483648, -2147483647, 2147483647},
	} {
		var file strings.Builder
		words := strings.Fields(others)
		for i := 0; i < len(words); i += 2 {
			fmt.Fprintf(&file, `<rule ipv="ipv4" table="nat" chain="%s" priority="%s">-j ACCEPT</rule>`, words[i], words[i+1])
		}
		merged := merge(t, []byte("<direct>"+file.String()+"</direct>"), s)
		lines := strings.Split(string(merged), "\n")
		slices.Reverse(lines[1 : len(lines)-1])
		d, err := persist.ReadDirect([]byte(strings.Join(lines, "\n")))
		if err != nil {
			t.Fatal(err)
		}
		if changes := rules.Compare(rules.IPv4, d.Rules(rules.IPv4), s); changes != nil {
			t.Error(changes)
		}
		var got []int
		for _, hook := range []string{"OUTPUT", "PREROUTING"} {
			for _, e := range d.Entries {
				if e.IPv == "ipv4" && e.Table == "nat" && e.Chain == hook && e.Owner == persist.Ours {
					got = append(got, e.Priority)
				}
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %d, want %d", others, got, want)
		}
	}
}

// FuzzRemove: whatever the bytes are, it is an error or a file out of which nothing more
// goes, and entries of others stay.
func FuzzRemove(f *testing.F) {
	s := set(f, tproxy.Config{})
	for _, seed := range []string{"", "<direct/>", "<direct>" + foreign + "</direct>", "\ufeff<direct>\r\n</direct>", "<direct><rule ipv='ipv4' table='nat' chain='KUMA_MESH_DNS' priority='0'>-j KUMA_MESH_DNS</rule></direct>",
		"<direct><rule ipv='ipv4' table='nat' chain='KUMA_MESH_DNS' priority='0'>-j<!-- kuma-tproxy: ours ends --> A</rule></direct>"} {
		f.Add([]byte(seed))
		f.Add(merge(f, []byte(seed), s))
	}
	others := func(t *testing.T, file []byte) (out []string) {
		d, err := persist.ReadDirect(file)
		if err != nil {
			t.Fatalf("%q: %v", file, err)
		}
		for _, e := range d.Entries {
			if e.Owner != persist.Ours {
				out = append(out, e.String())
			}
		}
		return out
	}
	f.Fuzz(func(t *testing.T, file []byte) {
		rest, r, err := persist.RemoveDirect(file)
		if err != nil {
			return
		}
		if len(r.Removed) == 0 && !r.Rewritten && !bytes.Equal(rest, file) && rest != nil {
			t.Fatalf("nothing went, and %q became %q", file, rest)
		}
		if !slices.Equal(others(t, file), others(t, rest)) {
			t.Fatalf("%q became %q", file, rest)
		}
		if again, r, err := persist.RemoveDirect(rest); err != nil || len(r.Removed) > 0 || !identical(again, rest) {
			t.Fatalf("%q became %q and then %q, %v", file, rest, again, err)
		}
		merged, err := persist.MergeDirect(file, s)
		if err != nil {
			return
		}
		if again, err := persist.MergeDirect(merged, s); err != nil || !bytes.Equal(again, merged) {
			t.Fatalf("merged twice, %q: %v", again, err)
		}
		back, r, err := persist.RemoveDirect(merged)
		if err != nil {
			return // an entry of others needs a chain of ours
		}
		if !identical(back, rest) || r.Rewritten {
			t.Fatalf("%q, merged and taken out: %q", rest, back)
		}
	})
}
