// Package tproxytest is for tests, ours and those of importers: generators of
// configurations, hosts and packets, what the contract expects of a packet
// ([Expect]), the contract's theorems ([Theorems]) and all of them as one call
// ([Check]), and golden files ([Golden]).
//
// What it reports is random testing: so many configurations and packets were
// tried, nothing is proven.
package tproxytest
