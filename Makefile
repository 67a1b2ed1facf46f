# make            build ./run and ./train with whatever C compiler is here
# make demo       train a small Chain-of-Experts on word problems, then ask it one
# make test       everything that can be tested on this machine
# make bench      measure speed against what the machine can do: see the top of tests/bench.py
# make debug      run-debug and train-debug, with the address and undefined-behaviour sanitizers

# -O3 unrolls and vectorises; -march=native uses the widest vectors this machine has (leave it out, or
# name another -march, to build for another machine: make ARCH=). Never -ffast-math: it would let the compiler
# reorder sums, and results would depend on how. -fno-math-errno only says that nobody asks errno about
# sqrt, which may then be a vector instruction.
CFLAGS ?= -O3 -fno-math-errno
ARCH   ?= -march=native
# Each program uses a part of coe.c, and a compiler without OpenMP does not know its pragmas.
WARN    = -Wall -Wextra -Wno-unused-function -Wno-unknown-pragmas
PYTHON ?= python3
PEER_PYTHON ?= $(PYTHON)

# OpenMP where the compiler has it (make OPENMP= goes without).
OPENMP ?= $(shell echo 'int main(void){return 0;}' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)
PLAIN   = $(CC) $(WARN) $(CFLAGS) $(ARCH)
BUILD   = $(PLAIN) $(OPENMP)
SANITIZE = $(CC) $(WARN) -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined

all: run train
	@echo "built run and train with $(CC), $(if $(OPENMP),OpenMP,one thread: no OpenMP)"

run: run.c coe.c
	$(BUILD) -o $@ run.c -lm

train: train.c coe.c
	$(BUILD) -o $@ train.c -lm

debug: run-debug train-debug
%-debug: %.c coe.c
	$(SANITIZE) $(OPENMP) -o $@ $< -lm

demo: run train
	./train -o demo.bin --log demo.tsv
	./run demo.bin -t 0 -i "$$(./train --show_val 1 | head -n 1)"

test: run train
	CC="$(CC)" PLAIN="$(PLAIN)" BUILD="$(BUILD)" SANITIZE="$(SANITIZE)" $(PYTHON) tests/run_all.py

bench bench-quick: run train build/bench
	$(PYTHON) tests/bench.py $(if $(findstring quick,$@),--quick) $(if $(ONLY),--only "$(ONLY)") \
		$(if $(TSV),--tsv "$(TSV)") $(if $(PEER),--peer "$(PEER)" --peer_python "$(PEER_PYTHON)")

build/bench: tests/bench.c train.c coe.c
	@mkdir -p build
	$(BUILD) -o $@ $< -lm

clean:
	rm -f run train run-debug train-debug demo.bin demo.tsv
	rm -rf build

.PHONY: all debug demo test bench bench-quick clean
