#!/usr/bin/env bash
# Other machines, as far as Debian can stand in for them: each is compiled for without a warning,
# and computes the golden numbers under an emulator. The last line is "N passed, N failed, N
# skipped"; skipped is what has no compiler or emulator here.
#
#     tests/ports.sh [NAME...]      musl m32 aarch64 windows wasm; all of them without a name
#     LONG=1 tests/ports.sh windows     also the training runs of the reference under wine
#
# Debian's packages: musl-tools; libc6-dev-i386 lib32gcc-12-dev; gcc-aarch64-linux-gnu qemu-user;
# gcc-mingw-w64-x86-64 wine64; clang lld wasi-libc libclang-rt-14-dev-wasm32, and node 20.
set -u
cd "$(dirname "$0")/.."
mkdir -p build/ci build/ports
export WINEDEBUG=-all OMP_WAIT_POLICY=passive
. tests/steps.sh
exe=
WARN="-Wall -Wextra -Werror -Wno-unused-function -Wno-unknown-pragmas"

# compile NAME COMMAND...: run and train with a compiler; a test needs dump_grads.
compile() {
    local name=$1 program job jobs=() bad=0
    shift
    for program in run.c train.c tests/dump_grads.c; do
        "$@" $WARN -o "build/ports/$name-$(basename "$program" .c)" "$program" -lm &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job" || bad=1; done
    return $bad
}
# under NAME EMULATOR...: (with $exe at the end of the programs' names) scripts that call the programs of a port through its emulator.
under() {
    local name=$1 program
    shift
    for program in run train dump_grads; do
        printf '#!/bin/sh\nexec %s "%s" "$@"\n' "$*" "$PWD/build/ports/$name-$program$exe" \
            >"build/ports/$name-$program.sh"
        chmod +x "build/ports/$name-$program.sh"
    done
}
# golden NAME [SUFFIX]: inference and training against the reference.
golden() {
    local at=build/ports/$1 suffix=${2:-}
    step "$1-golden-run" env ONLY=none python3 tests/test_run.py "$at-run$suffix"
    step "$1-golden-train" python3 tests/test_golden.py "$at-train$suffix" "$at-dump_grads$suffix"
}
# Whether the commands that a port needs are here; otherwise it is skipped.
have() {
    local command
    for command in "$@"; do
        command -v "$command" >/dev/null || {
            echo "skipped: no $command"
            skipped=$((skipped + 1))
            return 1
        }
    done
}

# train_a_little TRAIN RUN: trains, goes on, and reads what came out.
train_a_little() {
    local out=build/ports/little.bin
    "$1" -x 2 --hidden_size 16 --num_hidden_layers 1 --eval_problems 0 -o $out --log $out.tsv &&
        "$1" --resume $out -x 4 --log $out.tsv && [ "$(wc -l <$out.tsv)" = 5 ] &&
        "$2" $out -m info && "$2" $out -t 0 -n 5 -i "question:"
}

musl() {
    have musl-gcc || return
    step musl-build compile musl musl-gcc -static -std=c11 -O2
    step musl-run python3 tests/test_run.py build/ports/musl-run
    golden musl
}

# Where Debian's compilers for 32 bits and for aarch64 exclude each other, the headers of 64 bits do.
m32() {
    local include=-I/usr/include/x86_64-linux-gnu
    echo 'int main(void) { return 0; }' | gcc -m32 -x c - -o build/ports/try 2>/dev/null || {
        have gcc-with-32-bits
        return
    }
    step m32-build compile m32 gcc -m32 $include -O2
    # All but the file that 32 bits cannot hold, which test_run.py itself tries with 32 bits.
    step m32-run env ONLY="$(grep -o '^def test_\w*' tests/test_run.py | cut -c 5- |
        grep -vx test_large_file | tr '\n' ' ')" python3 tests/test_run.py build/ports/m32-run
    step m32-train env ONLY=test_further python3 tests/test_train.py \
        build/ports/m32-train
    golden m32
}

aarch64() {
    have aarch64-linux-gnu-gcc qemu-aarch64 || return
    step aarch64-build compile aarch64 aarch64-linux-gnu-gcc -static -O2
    under aarch64 qemu-aarch64
    golden aarch64 .sh
}

windows() {
    have x86_64-w64-mingw32-gcc wine || return
    step windows-build compile windows x86_64-w64-mingw32-gcc -static -O2 -fopenmp
    exe=.exe under windows wine
    step windows-version build/ports/windows-run.sh --version
    step windows-golden-run env ONLY=none python3 tests/test_run.py build/ports/windows-run.sh
    step windows-trains train_a_little build/ports/windows-train.sh build/ports/windows-run.sh
    if [ -n "${LONG:-}" ]; then     # minutes, under wine
        step windows-golden-train python3 tests/test_golden.py build/ports/windows-train.sh \
            build/ports/windows-dump_grads.sh
    fi
}

# WebAssembly has no threads and no signals here; answering is what a page in a browser wants.
wasm() {
    have clang wasm-ld node || return
    step wasm-build clang --target=wasm32-wasi -O2 $WARN -o build/ports/wasm-run run.c
    under wasm "node --no-warnings '$PWD/tests/wasi.mjs'"
    step wasm-golden-run env ONLY="test_types test_eval test_text test_bpe test_lens" \
        python3 tests/test_run.py build/ports/wasm-run.sh
}

for port in ${*:-musl m32 aarch64 windows wasm}; do "$port"; done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
