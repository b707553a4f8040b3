# See "make help". Everything runs without a terminal and without input.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := build
MAKEFLAGS += --no-print-directory

PREFIX ?= /usr
SYSCONFDIR ?= /etc
DESTDIR ?=
GO ?= go
export HOME ?= /root
export PATH := $(PATH):/usr/local/go/bin:/usr/sbin:/sbin

# The checkout may belong to somebody else than who builds it.
VERSION := $(shell git -c safe.directory='*' describe --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -X main.version=$(VERSION)
GOLANGCI_LINT := .cache/bin/golangci-lint
GOLANGCI_LINT_VERSION := v2.5.0

# Program, its package, and where it is installed. virtbackupd and its thaw watchdog link libvirt.
PROGRAMS := virtbackupd virtbackupctl virtbackup-worker virtbackup-thaw virtbackup-hook
virtbackupd_PACKAGE := daemon
virtbackupd_CGO := 1
virtbackupd_DIR := sbin
virtbackupctl_PACKAGE := ctl
virtbackupctl_CGO := 0
virtbackupctl_DIR := bin
virtbackup-worker_PACKAGE := daemon/worker
virtbackup-worker_CGO := 0
virtbackup-worker_DIR := libexec/virtbackup
virtbackup-thaw_PACKAGE := daemon/thaw
virtbackup-thaw_CGO := 1
virtbackup-thaw_DIR := libexec/virtbackup
virtbackup-hook_PACKAGE := hooks
virtbackup-hook_CGO := 0
virtbackup-hook_DIR := libexec/virtbackup
# What libvirt runs: a copy, as AppArmor and SELinux let libvirt run only what
# lies there. An admin's own qemu hook and the others in qemu.d stay.
HOOK := $(DESTDIR)$(SYSCONFDIR)/libvirt/hooks/qemu.d/virtbackup
BUILT := $(foreach p,$(PROGRAMS),$(if $(wildcard $($(p)_PACKAGE)/*.go),$(p)))

# Packages with tests that run in the lab (build tag lab).
LAB_PACKAGES ?= $(sort $(patsubst %/,./%,$(dir $(shell grep -rlE --include='*_test.go' '^//go:build .*\blab\b' * 2>/dev/null))))
# Those that test the installed daemon. The others are libraries, tried in a
# host without it: it would clear up what it finds of theirs.
LAB_DAEMON_PACKAGES ?= $(filter ./ctl ./daemon/labtest ./hooks ./systemd,$(LAB_PACKAGES))
LAB_LIBRARY_PACKAGES ?= $(filter-out $(LAB_DAEMON_PACKAGES),$(LAB_PACKAGES))
LAB_TIMEOUT ?= 60m
LAB_TEST = LAB_NO_BUILD=1 testdata/lab/run -- $(GO) test -tags lab -count=1 -p 1 -timeout $(LAB_TIMEOUT)
# More arguments for go test, such as -v or -run.
TESTFLAGS ?=
FUZZTIME ?= 20s
# Every shell script of the project.
SCRIPTS = $(shell grep -rlIE --exclude-dir=.git --exclude-dir=.cache --exclude-dir=bin --exclude='*.go' --exclude='*.md' --exclude='*.txt' '^\#!/bin/(ba|busybox )?sh|^\# shellcheck shell=' .)

.PHONY: help deps lint-deps build install test test-unit test-lab test-hosts test-nas lint bench fuzz-short faults demo clean
help: ## what can be made
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' Makefile | expand -t 16

deps: ## install what building and testing need (Debian, Ubuntu; names it for Fedora and EL)
	@testdata/deps </dev/null

lint-deps: $(GOLANGCI_LINT)
$(GOLANGCI_LINT):
	GOFLAGS= GOBIN="$(CURDIR)/.cache/bin" $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION) </dev/null

build: $(addprefix build-,$(BUILT)) ## build the programs into bin/
build-%:
	@mkdir -p bin
	CGO_ENABLED=$($*_CGO) $(GO) build -buildvcs=false -trimpath -ldflags '$(LDFLAGS)' -o bin/$* ./$($*_PACKAGE)

# Kinds of files and where each goes, below PREFIX.
FILES := \
	lib/systemd/system:$(wildcard systemd/*.service systemd/*.slice systemd/*.socket systemd/*.timer) \
	lib/systemd/catalog:$(wildcard daemon/internal/journal/*.catalog) \
	share/dbus-1/system.d:$(wildcard dbus/*.conf) \
	share/dbus-1/system-services:$(wildcard dbus/*.service) \
	share/dbus-1/interfaces:$(wildcard dbus/*.xml) \
	share/polkit-1/actions:$(wildcard policy/*.policy) \
	$(foreach n,1 5 8,share/man/man$(n):$(wildcard ctl/*.$(n) ctl/*/*.$(n) daemon/*.$(n) daemon/*/*.$(n) hooks/*.$(n) systemd/*.$(n)))

install: ## install what "make build" built (DESTDIR, PREFIX, SYSCONFDIR)
	@$(foreach p,$(BUILT),install -D -m 755 bin/$(p) $(DESTDIR)$(PREFIX)/$($(p)_DIR)/$(p);)
	@for file in $(FILES); do \
		case $$file in *:*) dir=$(DESTDIR)$(PREFIX)/$${file%%:*}; file=$${file#*:} ;; esac; \
		[ -z "$$file" ] || install -D -m 644 "$$file" "$$dir/$${file##*/}"; \
	done
	@[ -n "$(DESTDIR)" ] || ! command -v journalctl >/dev/null || journalctl --update-catalog
ifneq ($(filter virtbackup-hook,$(BUILT)),)
	@[ -e $(HOOK) ] || echo 'Reload libvirtd (systemctl reload libvirtd): it looks for hooks when it starts and when it is reloaded.'
	@install -D -m 755 bin/virtbackup-hook $(HOOK)
endif
ifneq ($(filter virtbackupctl,$(BUILT)),)
	@install -d $(DESTDIR)$(PREFIX)/share/{bash-completion/completions,zsh/vendor-completions,fish/vendor_completions.d}
	@bin/virtbackupctl completion bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/virtbackupctl
	@bin/virtbackupctl completion zsh >$(DESTDIR)$(PREFIX)/share/zsh/vendor-completions/_virtbackupctl
	@bin/virtbackupctl completion fish >$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/virtbackupctl.fish
endif

test: deps test-unit test-lab test-hosts ## set up, and run all tests

test-unit: deps ## the tests that need no lab
	$(GO) test -race $(TESTFLAGS) ./... </dev/null

# Compiled outside first: an error in the code shows before a host boots.
test-lab: deps build ## the tests that run on a real host, in the lab
	testdata/lab/test </dev/null
	$(GO) vet -tags lab $(LAB_PACKAGES)
	$(LAB_TEST) $(TESTFLAGS) $(LAB_LIBRARY_PACKAGES) </dev/null
	$(LAB_TEST) $(TESTFLAGS) $(LAB_DAEMON_PACKAGES) </dev/null

# They boot, reboot and end hosts themselves.
test-hosts: deps build ## the tests that drive several hosts of the lab, or reboot one
	testdata/guest/build </dev/null
	LAB_NO_BUILD=1 $(GO) test -tags hosts -count=1 -p 1 -timeout 15m $(TESTFLAGS) ./daemon/hosttest </dev/null

# The test program runs in a virtual machine; see testdata/nas/run.
test-nas: deps build ## the tests with real NFS and CIFS servers and the kernel's mounts, in a virtual machine
	testdata/guest/build </dev/null
	LAB_NO_BUILD=1 $(GO) test -tags nas -count=1 -p 1 -timeout 15m -exec "$(CURDIR)/testdata/nas/run" $(TESTFLAGS) ./daemon/nastest </dev/null

faults: deps build ## only the lab's tests that kill and break things
	TEST_FAULTS=all TEST_ACTIONS=all $(LAB_TEST) -run 'Fault|Kill|Crash|Interrupted|Full|Fails|Actions' $(TESTFLAGS) $(LAB_DAEMON_PACKAGES) </dev/null

fuzz-short: ## every fuzz target, FUZZTIME each
	grep -roE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' * | sed 's/:func / /' | while read -r file target; do \
		$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) "./$${file%/*}" </dev/null || exit 1; \
	done

# In memory: on a disk all would wait for the same disk. LAB_DISK=1 measures that.
bench: deps build ## measure against other tools; prints the table of README.md
	LAB_NO_BUILD=1 LAB_SIZE=12G testdata/lab/run -- testdata/bench/run </dev/null

demo: deps build ## the main job on a host with a guest, as a person would run it
	LAB_NO_BUILD=1 testdata/lab/run -- testdata/demo/run </dev/null

lint: lint-deps ## golangci-lint (with the layering rules of .golangci.yml) and shellcheck
	GOMEMLIMIT=2GiB GOGC=50 $(GOLANGCI_LINT) run --build-tags lab,hosts,nas --concurrency 2 --timeout 15m ./... </dev/null
	shellcheck -x -P SCRIPTDIR $(SCRIPTS) </dev/null

clean: ## remove what was built, and what killed lab hosts left
	testdata/lab/clean
	rm -rf bin .cache
