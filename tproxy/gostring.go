package tproxy

import (
	"fmt"
	"net/netip"
	"reflect"
	"strings"
)

// GoString writes the Config as Go source without the fields that are zero, so
// that a counterexample can be read and pasted into a test.
func (c Config) GoString() string { return source(reflect.ValueOf(c)) }

// GoString writes the Host as Go source without the fields that are zero.
func (h Host) GoString() string { return source(reflect.ValueOf(h)) }

func source(v reflect.Value) string {
	switch x := v.Interface().(type) {
	case netip.Prefix:
		return fmt.Sprintf("netip.MustParsePrefix(%q)", x)
	case netip.Addr:
		return fmt.Sprintf("netip.MustParseAddr(%q)", x)
	case Config, Host:
	case fmt.GoStringer:
		return x.GoString()
	}
	switch v.Kind() {
	case reflect.Struct:
		var fields []string
		for i := range v.NumField() {
			if f := v.Field(i); !f.IsZero() {
				fields = append(fields, v.Type().Field(i).Name+": "+source(f))
			}
		}
		return v.Type().String() + "{" + strings.Join(fields, ", ") + "}"
	case reflect.Slice:
		items := make([]string, v.Len())
		for i := range items {
			items[i] = source(v.Index(i))
		}
		return v.Type().String() + "{" + strings.Join(items, ", ") + "}"
	case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Int, reflect.Int64:
		return fmt.Sprintf("%d", v.Interface())
	}
	return fmt.Sprintf("%#v", v.Interface())
}
