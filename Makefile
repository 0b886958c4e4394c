# What a developer and the CI run. `make help` lists the targets.

GO       ?= go
FUZZTIME ?= 5s
FUZZ     ?= .
FUZZJOBS ?= 1
FUZZPARALLEL ?= 1
BENCH    ?= .
CRASHES  ?= 300
ROUNDS   ?= 10
SEEDS    ?= 3000
VERSION  ?= $(shell git describe --always --dirty --tags 2>/dev/null || echo dev)
# The tools have a module of their own, so that their dependencies are not ours.
TOOL     := $(GO) tool -modfile=third_party/tools/go.mod
PROTOS    = $(shell git ls-files --cached --others --exclude-standard -- 'proto/*.proto')
PROTO_OUT = proto

.DEFAULT_GOAL := help
.PHONY: help build test race lint vuln fmt fuzz crash sim chaos upgrade hostile manifests bench cover proto check check-fmt check-tidy check-proto

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{ printf "  %-12s %s\n", $$1, $$2 }'

build: ## build bin/mettle and bin/elan, static
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/ ./mettle ./elan

test: ## run the tests
	$(GO) test ./...

race: ## run the tests, end to end ones too, with the race detector, in random order
	$(GO) test -race -shuffle=on -timeout=25m ./...

lint: ## vet, and golangci-lint with the rules on imports, sizes and style
	$(GO) vet ./...
	$(TOOL) golangci-lint run ./...

vuln: ## run govulncheck over the programs; it asks https://vuln.go.dev, or VULNDB
	$(TOOL) govulncheck $(if $(VULNDB),-db $(VULNDB)) ./elan ./mettle

fmt: ## format all Go files, and sort their imports
	$(TOOL) golangci-lint fmt ./...

# Each package's test binary is built once, with the counters that guide the fuzzer. What
# is of interest is made smaller in a few attempts: go's own minute for each left some
# targets with four executions in fifteen seconds, now 2,000 in eight.
# What a target finds is kept as a seed in its testdata/fuzz, and named at the end. That
# a worker is late when the time is up is no failure, though go calls it one.
fuzz: ## run each fuzz target that matches FUZZ (.) for FUZZTIME (5s), FUZZJOBS (1) at a time
	@set -e; bin="$(CURDIR)/bin/fuzz"; mkdir -p "$$bin"; rm -f "$$bin/failed"; \
	grep -r --include='*_test.go' -o '^func Fuzz[A-Za-z0-9_]*' . | sed 's,^\./,,; s,/[^/]*:func , ,' | sort -u | grep -E -- '$(FUZZ)' >"$$bin/targets"; \
	cut -d' ' -f1 "$$bin/targets" | sort -u | while read -r dir; do \
		$(GO) test -c -fuzz=. -o "$$bin/$$(echo "$$dir" | tr / _).test" "./$$dir"; \
	done; \
	xargs -P $(FUZZJOBS) -L 1 sh -c 'cd "$$1" && out=$$("$$0/$$(echo "$$1" | tr / _).test" -test.run="^\$$" -test.fuzz="^$$2\$$" \
		-test.fuzztime=$(FUZZTIME) -test.fuzzminimizetime=20x -test.fuzzcachedir="$$0/cache/$$1" -test.parallel=$(FUZZPARALLEL) 2>&1) \
		|| { echo "$$out" | grep -q "^ *context deadline exceeded" && ! echo "$$out" | grep -q "Failing input"; } \
		&& echo "$$1 $$2: $$(echo "$$out" | sed -n "s/.*execs: \([0-9]*\) .*/\1/p" | tail -1) executions" \
		|| { echo "$$out"; echo "$$1 $$2: FAILED"; echo "$$1 $$2" >>"$$0/failed"; }' "$$bin" <"$$bin/targets"; \
	if [ -e "$$bin/failed" ]; then echo "failed:"; cat "$$bin/failed"; exit 1; fi; \
	echo "$$(wc -l <"$$bin/targets") targets, $(FUZZTIME) each"

crash: ## kill a process that writes to a store CRASHES (300) times, and compare all that it acknowledged
	METTLE_TEST_CRASH_ROUNDS=$(CRASHES) $(GO) test -count=1 -v -timeout=1h -run='^TestStore_kill$$' ./elan/blob/file

chaos: ## build ROUNDS (10) times over each broker while processes of a fleet are killed
	METTLE_CHAOS_ROUNDS=$(ROUNDS) $(GO) test -count=1 -v -timeout=2h -run='^TestFleet_chaos$$' ./mettle/e2e

upgrade: ## build with fleets of this tree and of the programs of the commit RELEASE, see deploy/UPGRADES.md
	@test -n "$(RELEASE)" || { echo "RELEASE names no commit or tag"; exit 2; }
	@set -e; dir="$$(mktemp -d)"; trap 'git worktree remove --force "$$dir/tree"; rm -rf "$$dir"' EXIT; \
	git worktree add --quiet --detach "$$dir/tree" "$(RELEASE)"; \
	(cd "$$dir/tree" && $(GO) build -ldflags '-X main.version=$(RELEASE)' -o "$$dir/" ./mettle ./elan); \
	METTLE_E2E_RELEASE="$$dir" $(GO) test -count=1 -v -timeout=1h -run='^TestFleet_(mixed|rolling)$$' ./mettle/e2e

hostile: ## run all that actions could do to harm others, see mettle/worker/hostile
	METTLE_TEST_HOSTILE_LARGE=1 $(GO) test -count=1 -v -timeout=1h ./mettle/worker/hostile

manifests: ## have Kubernetes' own code take what deploy/kubernetes makes, see third_party/manifests
	METTLE_TEST_KUBERNETES=1 $(GO) test -count=1 -v -timeout=30m -run='^TestKubernetes_accepted$$' ./deploy

sim: ## run SEEDS (3000) fleets with faults in virtual time, see mettle/e2e/sim
	$(GO) test -count=1 -v -timeout=1h ./mettle/e2e/sim -args -seeds $(SEEDS)

bench: ## run the Go benchmarks that match BENCH (.); `mettle bench` measures a server
	$(GO) test -run='^$$' -bench='$(BENCH)' -benchmem ./...

cover: ## run the tests, and show which statements they reach, in bin/coverage.html
	@mkdir -p bin
	$(GO) test -coverprofile=bin/coverage.out -coverpkg=./... ./...
	$(GO) tool cover -func=bin/coverage.out | tail -1
	$(GO) tool cover -html=bin/coverage.out -o bin/coverage.html

proto: ## generate the Go code of proto/, with protoc
	@mkdir -p bin $(PROTO_OUT)
	$(GO) build -modfile=third_party/tools/go.mod -o bin/ google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
	PATH="$(CURDIR)/bin:$$PATH" protoc -I proto --go_out=$(PROTO_OUT) --go_opt=paths=source_relative \
		--go-grpc_out=$(PROTO_OUT) --go-grpc_opt=paths=source_relative $(PROTOS)

check: check-fmt check-tidy check-proto build lint race sim ## all that the CI runs

check-fmt:
	@$(TOOL) golangci-lint fmt --diff ./... || { echo "not formatted, run make fmt"; exit 1; }

check-tidy:
	$(GO) mod tidy -diff

# The generated code names the versions of its makers, which are not compared.
check-proto:
	@command -v protoc >/dev/null || { echo "protoc is not installed: the generated code is not compared"; exit 0; }; \
	set -e; new=$$(mktemp -d); trap 'rm -rf "$$new"' EXIT; \
	$(MAKE) --no-print-directory proto PROTO_OUT="$$new" >/dev/null; \
	diff -ru -I '^//.*protoc.* v[0-9]' --exclude='*.proto' --exclude=README.md --exclude=releases proto "$$new" || { echo "not that of its .proto, run make proto"; exit 1; }
