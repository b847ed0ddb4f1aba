.PHONY: demo test test-all bench lint build mutate soak

demo: ; @hack/deps demo && go run ./examples/quickstart
test: ; @hack/test
test-all: ; @hack/test -all
bench: ; @hack/deps test && go run ./bench/install && go run ./bench/inspect && go run ./bench/cni && go test -run '^$$' -bench . ./tproxy/...
lint: ; @hack/check
build: ; CGO_ENABLED=0 go build -trimpath -o . ./cli/cmd/kumactl ./cni/cmd/kuma-cni
mutate: ; @TPROXY_SUITE=mutate go test -count=1 -v -run '^TestMutants$$' ./tproxy
soak: ; @hack/deps test && TPROXY_SUITE=soak go test -count=1 -v -timeout 0 -run '^TestSoak$$' ./tproxy/exec/differential
