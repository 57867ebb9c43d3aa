#!/bin/sh
# Shows that the sanitizers of a mode are awake: each must stop the tests at its errors in planted_test.cpp.
#
#     tests/native/check_planted.sh asan build/native/asan/tests
set -eu
mode=$1
tests=$2

must_report() {
    report=$1
    title=$2
    if output=$("$(dirname "$0")/run.sh" "$mode" "$tests" --no-skip --test-case="planted: $title" 2>&1); then
        echo "no sanitizer of $mode stopped '$title'" >&2
        exit 1
    fi
    echo "$output" | grep -q "$report" || {
        echo "$output" >&2
        echo "'$title' failed under $mode, but not by: $report" >&2
        exit 1
    }
}

case $mode in
plain) ;;
asan)
    must_report 'ERROR: AddressSanitizer' 'a digest of one byte more than there is'
    must_report 'LeakSanitizer: detected memory leaks' 'memory that nobody frees'
    must_report 'runtime error: .*misaligned address' 'a load that is not aligned'
    must_report 'runtime error: signed integer overflow' 'a sum that does not fit'
    ;;
tsan)
    must_report 'ThreadSanitizer: data race' 'tasks that write the same place'
    ;;
esac
