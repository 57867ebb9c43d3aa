#!/bin/sh
# Prints the folder of a CUDA toolkit on this machine, the first that holds bin/nvcc of: CUDA_HOME, CUDA_PATH, the
# one that the nvcc on PATH belongs to, /usr/local/cuda. Prints nothing if there is none.
#
#     scripts/find_cuda.sh
set -u

# nvcc may be a link or a script: it says itself where its toolkit is.
of_nvcc_on_path() {
    nvcc --dryrun -x cu -c /dev/null -o /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p'
}

for home in "${CUDA_HOME:-}" "${CUDA_PATH:-}" "$(of_nvcc_on_path)" /usr/local/cuda; do
    if [ -n "$home" ] && [ -x "$home/bin/nvcc" ]; then
        cd "$home" && pwd -P
        exit
    fi
done
