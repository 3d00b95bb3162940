# Everything that people and CI run. The first target prints the list.

GOLANGCI_LINT_VERSION := v2.15.0
FUZZTIME ?= 10s

LINT := .bin/golangci-lint
LINT_STAMP := .bin/golangci-lint-$(GOLANGCI_LINT_VERSION)

.DEFAULT_GOAL := help
.PHONY: help build test race vet fmt fmt-check tidy-check lint fuzz bench bench-peers bench-outbox demo ci

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Compile everything
	go build ./...

test: ## Run all tests, as a user does; servers start by themselves
	go test ./...

race: ## Run all tests under the race detector
	go test -race ./...

vet: ## Run go vet
	go vet ./...

fmt: $(LINT_STAMP) ## Format the code
	$(LINT) fmt

fmt-check: ## Fail if gofmt would change a file
	@files=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$files" || { echo "gofmt would change:"; echo "$$files"; exit 1; }

tidy-check: ## Fail if go mod tidy would change go.mod or go.sum
	go mod tidy -diff

lint: $(LINT_STAMP) ## Run golangci-lint with .golangci.yml
	$(LINT) run ./...

$(LINT_STAMP):
	GOBIN=$(CURDIR)/.bin go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION)
	@rm -f .bin/golangci-lint-v* && touch $@

fuzz: ## Fuzz every decoder for FUZZTIME each (10s)
	@set -e; for pkg in $$(go list ./...); do \
		for target in $$(go test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
			echo "$$pkg $$target"; \
			go test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) $$pkg; \
		done; \
	done

bench: ## Run all benchmarks, with allocations
	go test -run '^$$' -bench . -benchmem ./...

bench-peers: ## Compare the bus with its peers, in under five minutes
	cd bench && go run .

bench-outbox: ## Compare the outbox with its peers, in under six minutes
	cd bench && go run ./outbox

demo: ## Run the shop: four services, NATS and PostgreSQL in one command
	go run ./examples/shop

ci: ## Do what CI does
	./.ci/run
