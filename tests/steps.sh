# Runs tests and adds up what they say in their last line. Sourced by .ci/run and tests/long.sh.
COUNTS='^([0-9]+) passed, ([0-9]+) failed(, ([0-9]+) skipped)?$'
passed=0 failed=0 skipped=0

# run NAME COMMAND...: runs it, output and exit code go to build/ci. It may run in the background.
run() {
    local name=$1 start=$SECONDS
    shift
    "$@" >"build/ci/$name.out" 2>&1 </dev/null
    echo "$? $((SECONDS - start))" >"build/ci/$name.end"
}

# count NAME: adds what its output says in the end, or 1 by its exit code; shows what failed.
count() {
    local name=$1 code=1 seconds=0 last p=0 f=0 s=0
    read -r code seconds <"build/ci/$name.end"
    last=$(grep -E "$COUNTS" "build/ci/$name.out" | tail -n 1)
    if [[ $last =~ $COUNTS ]]; then
        p=${BASH_REMATCH[1]} f=${BASH_REMATCH[2]} s=${BASH_REMATCH[4]:-0}
        [ "$code" != 0 ] && [ "$f" = 0 ] && f=1
    elif [ "$code" = 0 ]; then p=1; else f=1; fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    printf '%-28s %6d passed %4d failed %4d skipped %5d s\n' "$name" "$p" "$f" "$s" "$seconds"
    if [ $((f + s)) != 0 ]; then tail -n 200 "build/ci/$name.out" | sed 's/^/    /'; fi
}
step() { run "$@"; count "$1"; }

