#!/bin/sh
# Builds csrc/cuda/*.cu for the host, with the stand-in for CUDA that lies here.
#
#     tests/native/cuda_on_host/build.sh library OUT       a shared library, for test_cuda_on_host.py
#     tests/native/cuda_on_host/build.sh plain|asan|tsan OUT    a program that runs every kernel and compares
set -eu
mode=$1
case $2 in
    /*) out=$2 ;;
    *) out=$PWD/$2 ;;
esac
cd "$(dirname "$0")/../../.."
here=tests/native/cuda_on_host

flags="-std=c++20 -O2 -g1 -Wall -Wextra -Wno-unknown-pragmas -I$here -pthread"
sources="$here/cuda_runtime.cpp $here/lanes.cpp"
case $mode in
    library) flags="$flags -fPIC -shared" sources="$sources $here/fibers.cpp $here/calls.cpp" ;;
    plain) sources="$sources $here/fibers.cpp $here/kernels_test.cpp" ;;
    asan)
        flags="$flags -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
        sources="$sources $here/threads.cpp $here/kernels_test.cpp"
        ;;
    tsan) flags="$flags -fsanitize=thread" sources="$sources $here/threads.cpp $here/kernels_test.cpp" ;;
    *)
        echo "$0: there is no mode $mode" >&2
        exit 2
        ;;
esac

# One object a source, so that a compiler cache serves those that did not change.
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
for source in $sources csrc/cuda/*.cu; do
    ${CXX:-c++} $flags -x c++ -c -o "$objects/$(basename "$source").o" "$source"
done
${CXX:-c++} $flags -o "$out" "$objects"/*.o
