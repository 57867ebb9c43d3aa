#!/bin/sh
# Installs doctest, with which the C++ tests are written, where the compiler ($CXX) does not find it. For CI, on
# Debian and Ubuntu: as root, or where sudo asks for no password.
set -eu

echo '#include <doctest/doctest.h>' | "${CXX:-c++}" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null && exit 0

root=
if [ "$(id -u)" -ne 0 ]; then
    root="sudo -n"
    $root true 2>/dev/null || {
        echo "doctest is missing, and this is not root: as root, run apt-get install doctest-dev" >&2
        exit 1
    }
fi
echo "==> installing doctest-dev"
$root apt-get -qq update
$root apt-get -qq install --no-install-recommends doctest-dev
