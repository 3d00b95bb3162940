package rpc

import (
	"strings"

	"github.com/postrider/postrider"
)

// subjectOf returns the NATS subject of a method: "rpc.<service>.<Method>" after the prefix.
func subjectOf(prefix, name string) string {
	service, method, _ := strings.Cut(name, "/")
	if prefix != "" {
		return prefix + ".rpc." + service + "." + method
	}
	return "rpc." + service + "." + method
}

// checkPrefix holds a subject prefix to tokens without wildcards.
func checkPrefix(field, prefix string) error {
	if prefix == "" {
		return nil
	}
	for token := range strings.SplitSeq(prefix, ".") {
		if token == "" || strings.ContainsAny(token, "*> \t\r\n") {
			return postrider.Errorf(postrider.InvalidArgument,
				"rpc: %s is %q: want tokens joined by dots, without wildcards and spaces", field, prefix)
		}
	}
	return nil
}
