.PHONY: demo test test-all bench lint build

demo: ; @hack/deps demo && go run ./examples/quickstart
test: ; @hack/test
test-all: ; @hack/test -all
bench: ; @hack/deps test && go run ./bench/install && go test -run '^$$' -bench . ./tproxy/...
lint: ; @hack/check
build: ; CGO_ENABLED=0 go build -trimpath -o kumactl ./cli/cmd/kumactl
