// Package netlab is a small throw-away lab of network namespaces, for tests
// with real packets, the demo and the benchmarks:
//
//	client  10.0.0.1/24, fd00::1/64  "another host", and the whole internet:
//	   |    93.184.216.34, 8.8.8.8, 2606:2800:220:1::1, 2001:4860:4860::8888
//	 host   10.0.0.2/24, fd00::2/64, default route to the client
//	   |    172.17.0.1/16, fd01::1/64 on br0, after AddContainer
//	container 172.17.0.2/16, fd01::2/64
//
// Nothing of it has a name on disk: a namespace is held open by a file
// descriptor and goes with it. It needs root, or newuidmap(1) for a user
// namespace with more than one UID, and the program ip.
//
// A program enters by [Reexec], a test binary by [Main]: they run the program
// again in network and mount namespaces of its own, so that neither the
// machine's rules nor its /run/xtables.lock can be touched, whatever goes wrong.
//
// Goroutines and namespaces: [Lab.In] and [As] lock the calling goroutine to its
// thread for as long as the function runs. Sockets that are opened and programs
// that are started in there, by that goroutine, are the namespace's and the
// user's; goroutines that are started in there are not.
package netlab
