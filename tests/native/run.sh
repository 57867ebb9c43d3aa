#!/bin/sh
# Runs a program that was built for a mode (plain, asan or tsan), so that it ends at the first error, and in
# any case after some minutes.
#
#     tests/native/run.sh tsan build/native/tsan/tests --test-case='thread pool*'
set -eu
mode=$1
shift

case $mode in
plain) ;;
asan)
    # doctest's own handlers would hide the reports of wild pointers.
    export ASAN_OPTIONS="detect_stack_use_after_return=1:strict_string_checks=1:handle_segv=2:handle_sigbus=2"
    export UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1"
    ;;
tsan)
    # Without the last, a child that starts threads after fork ends at once: ours does so on purpose.
    export TSAN_OPTIONS="halt_on_error=1:second_deadlock_stack=1:handle_segv=2:handle_sigbus=2:die_after_fork=0"
    ;;
*)
    echo "$0: the mode is plain, asan or tsan, not '$mode'" >&2
    exit 2
    ;;
esac

# Kernels that scatter addresses widely put memory where older sanitizers do not expect it. Where a container
# forbids to turn that off, most of them run all the same.
if [ "$mode" != plain ] && setarch "$(uname -m)" -R true 2>/dev/null; then
    set -- setarch "$(uname -m)" -R "$@"
fi
# The signal lets doctest say which test it was.
exec timeout --signal=ABRT --kill-after=10 "${NATIVE_TIMEOUT:-300}" "$@"
