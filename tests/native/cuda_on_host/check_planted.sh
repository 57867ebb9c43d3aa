#!/bin/sh
# Shows that ThreadSanitizer sees the barriers of the kernels: it must stop a copy of them that lacks one.
set -eu
cd "$(dirname "$0")/../../.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
mkdir -p "$copy/tests/native"
cp -r csrc "$copy"
cp -r tests/native/cuda_on_host "$copy/tests/native"

# The one in the loop over a chunk's batches stands deepest.
sed -i '/^    __syncthreads();$/d' "$copy/csrc/cuda/digest.cu"
if cmp -s csrc/cuda/digest.cu "$copy/csrc/cuda/digest.cu"; then
    echo "csrc/cuda/digest.cu has no barrier where this script looks for it" >&2
    exit 1
fi
"$copy/tests/native/cuda_on_host/build.sh" tsan "$copy/program"
if output=$(tests/native/run.sh tsan "$copy/program" 2>&1); then
    echo "ThreadSanitizer did not miss the barrier that was taken out" >&2
    exit 1
fi
echo "$output" | grep -q 'ThreadSanitizer: data race' || {
    echo "$output" >&2
    exit 1
}
