# make            build ./run and ./train with whatever C compiler is here
# make demo       train a small Chain-of-Experts on word problems, then ask it one
# make test       everything that can be tested on this machine
# make bench      measure speed against what the machine can do: see the top of tests/bench.py
# make fuzz       random inputs, for 20 seconds a target: see the top of tests/fuzz/run.py
# make clean      removes what was built; make distclean a demo that was trained, too
# make figures    draws the README's figures, after training the demo if there is none yet
# make lab        puts the demo into lab/, as the repository has it
# make plain      run-plain and train-plain, which compute with the plain loops printed in coe.c [4]
# make single     build/run-single.c and build/train-single.c: each program as one file
# make debug      run-debug and train-debug, with the address and undefined-behaviour sanitizers
# make plain-debug  the plain loops for a debugger: not optimised, one thread, with the sanitizers

# -O3 unrolls and vectorises; ARCH uses the widest vectors this machine has (make ARCH= builds for
# any machine of the kind, and is up to two times slower). Never -ffast-math: it would let the
# compiler reorder sums, and results would depend on how. -fno-math-errno only says that nobody asks
# errno about sqrt, which may then be a vector instruction.
CFLAGS ?= -O3 -fno-math-errno
# Each program uses a part of coe.c, and a compiler without OpenMP does not know its pragmas.
WARN    = -Wall -Wextra -Wno-unused-function -Wno-unknown-pragmas
PYTHON ?= python3
PEER_PYTHON ?= $(PYTHON)
LIBS    = -lm $(if $(filter Windows_NT,$(OS)),-lpthread)

# The first of some flags that the compiler takes, or nothing.
first_of = $(shell for flags in $(1); do echo 'int main(void) { return 0; }' | \
    $(CC) $$flags -x c - -o /dev/null 2>/dev/null && echo "$$flags" && break; done)
ifeq ($(origin ARCH),undefined)
ARCH := $(call first_of,-march=native -mcpu=native)
endif
# OpenMP where the compiler has it (make OPENMP= goes without). macOS has it from Homebrew.
ifeq ($(origin OPENMP),undefined)
BREW   := $(if $(filter Darwin,$(shell uname)),$(shell brew --prefix libomp 2>/dev/null))
OPENMP := $(call first_of,-fopenmp "-Xpreprocessor -fopenmp -I$(BREW)/include -L$(BREW)/lib -lomp")
endif
ONE_THREAD = one thread: no OpenMP (macOS: brew install libomp; \
             Debian or WSL: apt install gcc, or libomp-dev for clang)
SERIAL  = $(CC) $(WARN) $(CFLAGS) $(ARCH)
BUILD   = $(SERIAL) $(OPENMP)
SANITIZE = $(CC) $(WARN) -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined
SOURCES = coe.c $(wildcard lib/*.h) build/compiler

all: run train
	@echo "built run and train with $(CC), $(if $(OPENMP),OpenMP,$(ONE_THREAD))"

run: run.c $(SOURCES)
	$(BUILD) -o $@ run.c $(LIBS)

train: train.c $(SOURCES)
	$(BUILD) -o $@ train.c $(LIBS)

# How things were compiled: with another compiler, or other flags, they are compiled anew.
build/compiler: FORCE
	@mkdir -p build
	@$(CC) --version >/dev/null 2>&1 || { echo "no C compiler $(CC): install gcc or clang" \
	    "(Debian, WSL: apt install gcc; macOS: xcode-select --install)"; exit 1; }
	@echo '$(BUILD)' | cmp -s - $@ || echo '$(BUILD)' > $@
FORCE:

plain: run-plain train-plain
%-plain: %.c $(SOURCES)
	$(BUILD) -DPLAIN -o $@ $< $(LIBS)

debug: run-debug train-debug
%-debug: %.c $(SOURCES)
	$(SANITIZE) $(OPENMP) -o $@ $< $(LIBS)

plain-debug: run-plain-debug train-plain-debug
%-plain-debug: %.c $(SOURCES)
	$(SANITIZE) -O0 -DPLAIN -o $@ $< $(LIBS)

# Every #include "..." is replaced, the first time, by what it includes.
SINGLE = awk 'function emit(file,   line, part) { \
	    while ((getline line < file) > 0) \
	        if (line !~ /^\#include "/) print line; \
	        else { split(line, part, "\""); if (!seen[part[2]]++) emit(part[2]) } } \
	BEGIN { emit(ARGV[1]) }'
single: build/run-single.c build/train-single.c
build/%-single.c: %.c $(SOURCES)
	@mkdir -p build
	$(SINGLE) $< > $@

LEVEL2  = --level 2 -x 28800 --eval_steps 1440 --eval_problems 1000
demo: run train
	./train -o demo.bin --log demo.tsv
	./run demo.bin -t 0
	@echo 'Now ask it:  ./run demo.bin -t 0 -i "question: Mia had 20 figs and lost 7. How many are left?"'

# The demo as it is in the repository, a quarter of the size, and its log.
lab: demo.bin has-python
	$(PYTHON) -m venv build/python
	build/python/bin/pip install -q --disable-pip-version-check -r tests/requirements.txt
	build/python/bin/python export.py demo.bin lab/demo.bin --dtype q8
	cp demo.tsv lab/demo.tsv

# What README.md and docs/ show. build/level2.tsv, the log of the demo on harder problems, takes as
# long as all else: where it is missing, it is made.
DRAW    = build/figures/bin/python
RESULTS = experiments/results
figures: run train demo.bin build/level2.tsv build/figures/ready
	./train --show_val 30 > build/val.txt
	./run demo.bin -m eval -c 192 -f build/val.txt --trace build/trace.tsv > build/eval.txt
	$(DRAW) experiments/routing.py demo.bin build/trace.tsv --figures $(RESULTS)/demo \
		> $(RESULTS)/demo-routing.txt
	$(DRAW) experiments/figures.py grid $(RESULTS)/default-task $(RESULTS)/default-task
	cp demo.tsv build/level1.tsv
	$(DRAW) experiments/figures.py front $(RESULTS)/default-task 384 build/level1.tsv \
		build/level2.tsv $(RESULTS)/does-it-work
	./run lab/demo.bin -t 0 --trace build/chain.tsv \
		-i "question: Tom had 20 figs and lost 7. How many are left?" > build/chain.txt
	$(DRAW) experiments/figures.py chain lab/demo.bin build/chain.tsv $(RESULTS)/demo-chain
	./train --show_val 60 > build/val60.txt
	$(DRAW) experiments/rank.py lab/demo.bin build/val60.txt --figure $(RESULTS)/demo-rank \
		-- -c 192 --completion_only_loss true > $(RESULTS)/demo-rank.tsv
build/level2.tsv: | train
	@mkdir -p build
	./train $(LEVEL2) -o build/level2.bin --log $@
demo.bin:
	$(MAKE) demo
build/figures/ready: tests/requirements-figures.txt
	$(PYTHON) -m venv build/figures
	build/figures/bin/pip install -q --disable-pip-version-check -r $<
	touch $@

test: run train has-python
	CC="$(CC)" SERIAL="$(SERIAL)" BUILD="$(BUILD)" SANITIZE="$(SANITIZE)" $(PYTHON) tests/run_all.py

# For tests/run_all.py without make.
print-flags:
	@echo 'CC=$(CC)'; echo 'SERIAL=$(SERIAL)'; echo 'BUILD=$(BUILD)'; echo 'SANITIZE=$(SANITIZE)'
has-python:
	@$(PYTHON) --version >/dev/null 2>&1 || { echo "needs Python 3 (no program $(PYTHON) here):" \
	    "Debian, WSL: apt install python3 python3-venv; macOS: brew install python"; exit 1; }

bench bench-quick: run train build/bench has-python
	$(PYTHON) tests/bench.py $(if $(findstring quick,$@),--quick) $(if $(ONLY),--only "$(ONLY)") \
		$(if $(TSV),--tsv "$(TSV)") $(if $(PEER),--peer "$(PEER)" --peer_python "$(PEER_PYTHON)")

fuzz: has-python
	$(PYTHON) tests/fuzz/run.py

build/bench: tests/bench.c train.c $(SOURCES)
	@mkdir -p build
	$(BUILD) -o $@ $< $(LIBS)

# A trained demo stays; distclean takes it, too.
PROGRAMS = run train
clean:
	rm -f $(PROGRAMS) $(PROGRAMS:=-plain) $(PROGRAMS:=-debug) $(PROGRAMS:=-plain-debug)
	rm -rf build
distclean: clean
	rm -f demo.bin demo.tsv

.PHONY: FORCE all plain debug plain-debug single demo lab figures test print-flags has-python fuzz \
        bench bench-quick clean distclean
