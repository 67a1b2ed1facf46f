#!/usr/bin/env bash
# What takes too long for .ci/run, or wants what is not always at hand. After .ci/run, which makes
# build/venv and the programs. The last line is "N passed, N failed, N skipped".
#
#     tests/long.sh [SEED]
#     REFERENCE=FOLDER PYTHON=python tests/long.sh    also with configuration_coe.py and
#                         modeling_coe.py of the reference in FOLDER, and a Python that has
#                         transformers 4.49.0, PyTorch and the packages of requirements.txt
set -u
cd "$(dirname "$0")/.."
mkdir -p build/ci
. tests/steps.sh
export OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE=1

step fuzz-planted tests/fuzz/run.py --planted
step fuzz-long tests/fuzz/run.py 1200
step windows-long env LONG=1 tests/ports.sh windows
step import-long build/venv/bin/python tests/test_import.py "${1:-$RANDOM}"
if [ -n "${REFERENCE:-}" ]; then
    step torchrun-reference "${PYTHON:-python3}" tests/test_torchrun.py --reference "$REFERENCE"
else
    echo "skipped: torchrun with the reference, for REFERENCE names no folder"
    skipped=$((skipped + 1))
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
