// Kuma-cni is a chained CNI plugin that installs a pod's transparent proxying. It is
// independent work, not the Kuma project's program of that name.
package main

import (
	"os"

	"github.com/kumahq/kuma-tproxy/cni"
)

func main() { os.Exit(cni.Main(&cni.Plugin{})) }
