# Builds and runs the C++ tests, for `make native-test`.
#
# build/native/MODE/tests is csrc/core with all *_test.cpp. build/native/MODE/cuda_on_host is the CUDA kernels as
# host code; without sanitizers those run under pytest.

PYTHON ?= python3
BUILD := build/native
MODES := plain asan tsan

CXXFLAGS := -std=c++20 -g -pthread -Wall -Wextra -Werror -I$(BUILD)
FLAGS_plain := -O2
FLAGS_asan := -O1 -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS -fsanitize=address,undefined -fno-sanitize-recover=all
FLAGS_tsan := -O1 -fno-omit-frame-pointer -fsanitize=thread

SOURCES := $(wildcard csrc/core/*.cpp tests/native/*_test.cpp) tests/native/main.cpp
OBJECTS := $(patsubst %.cpp,%.o,$(notdir $(SOURCES)))
TESTS := $(MODES:%=$(BUILD)/%/tests)
CUDA_ON_HOST := $(BUILD)/asan/cuda_on_host $(BUILD)/tsan/cuda_on_host

.DELETE_ON_ERROR:
.PHONY: run FORCE

# One after another, so that each has the machine to itself and is read by itself.
run: $(TESTS) $(CUDA_ON_HOST)
	@for program in $^; do \
		mode=$$(basename $$(dirname $$program)); \
		echo "==> running $$program"; \
		tests/native/run.sh $$mode $$program || exit 1; \
	done
	@for mode in asan tsan; do tests/native/check_planted.sh $$mode $(BUILD)/$$mode/tests || exit 1; done
	@tests/native/cuda_on_host/check_planted.sh

vpath %.cpp csrc/core tests/native

define rules_of_mode
$(BUILD)/$(1)/tests: $(OBJECTS:%=$(BUILD)/$(1)/%) $(BUILD)/sources
	@$$(CXX) $$(CXXFLAGS) $$(FLAGS_$(1)) -o $$@ $$(filter %.o,$$^)

$(BUILD)/$(1)/%.o: %.cpp $(BUILD)/compiler | $(BUILD)/vectors.h
	@mkdir -p $$(@D)
	@$$(CXX) $$(CXXFLAGS) $$(FLAGS_$(1)) -MMD -MP -c -o $$@ $$<

$(BUILD)/$(1)/cuda_on_host: $(wildcard tests/native/cuda_on_host/* csrc/cuda/* csrc/core/*) $(BUILD)/compiler
	@mkdir -p $$(@D)
	@tests/native/cuda_on_host/build.sh $(1) $$@
endef
$(foreach mode,$(MODES),$(eval $(call rules_of_mode,$(mode))))

-include $(MODES:%=$(BUILD)/%/*.d)

$(BUILD)/vectors.h: tests/native/make_vectors.py tests/boundaries.py tests/vectors/digest.json tests/vectors/permutation.json
	@mkdir -p $(@D)
	@$(PYTHON) -m tests.native.make_vectors $@

# Written anew only when their words change: another compiler or other flags build all again, and a source that
# went away links again.
$(BUILD)/compiler: words = $(shell $(CXX) --version | head -1) $(CXXFLAGS) $(FLAGS_plain) $(FLAGS_asan) $(FLAGS_tsan)
$(BUILD)/sources: words = $(SOURCES)
$(BUILD)/compiler $(BUILD)/sources: FORCE
	@mkdir -p $(@D)
	@echo '$(words)' | cmp -s - $@ || echo '$(words)' > $@

FORCE:
