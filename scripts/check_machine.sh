#!/bin/sh
# Prints what this machine lacks for a target of the Makefile (setup or native-test), as one sentence that says
# what to install; nothing if it lacks nothing.
#
#     scripts/check_machine.sh PYTHON CXX TARGET
set -u
python=$1
cxx=$2
target=$3

lacks() {
    echo "$*"
    exit 0
}

"$python" -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null ||
    lacks "${python:-python3} is not Python 3.10 or newer: install that (on Debian: apt-get install python3" \
        "python3-venv python3-dev), or name one with make PYTHON=/path/to/python3"

printf '%s\n' '#include <bit>' '#include <span>' \
    'int main(int n, char** words) { return std::span(words, n).size() == std::bit_ceil(7u); }' |
    "$cxx" -std=c++20 -x c++ -c -o /dev/null - 2>/dev/null ||
    lacks "$cxx does not compile C++20: install GCC 11 or Clang 14 or a newer one (on Debian: apt-get install" \
        "g++), or name one with make CXX=/path/to/compiler"

if [ "$target" = setup ]; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        lacks "$python lacks its modules venv and ensurepip: install them (on Debian: apt-get install python3-venv)"

    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    echo '#include <Python.h>' | "$cxx" -std=c++20 -I"$include" -x c++ -c -o /dev/null - 2>/dev/null ||
        lacks "$python lacks its header Python.h: install it (on Debian: apt-get install python3-dev)"
fi

if [ "$target" = native-test ]; then
    echo '#include <doctest/doctest.h>' | "$cxx" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null ||
        lacks "$cxx finds no doctest/doctest.h, with which the C++ tests are written: install it (on Debian:" \
            "apt-get install doctest-dev)"

    for sanitizer in address,undefined thread; do
        echo 'int main() {}' | "$cxx" -fsanitize=$sanitizer -x c++ -o /dev/null - 2>/dev/null ||
            lacks "$cxx cannot link -fsanitize=$sanitizer: install its sanitizers (on Debian they come with g++," \
                "for Clang: apt-get install libclang-rt-dev)"
    done
fi
