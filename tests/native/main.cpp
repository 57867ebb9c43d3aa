// The program around all *_test.cpp: `tests --help` lists its options.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
