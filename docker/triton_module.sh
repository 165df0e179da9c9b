#!/bin/sh
# Fills a folder with the module that Triton makes against the CUDA driver. Runs in the image's build stage, without a GPU.
#   usage: triton_module.sh FOLDER     with the virtual environment's python on the path
set -eu

folder=$1
stand_in=$(mktemp -d)
apt-get update
apt-get install --yes --no-install-recommends gcc libc6-dev
# The module names this library and finds the real one when it is loaded beside a driver.
gcc -shared -Wl,-soname,libcuda.so.1 -o "$stand_in/libcuda.so.1" -x c /dev/null

# Triton writes the module before it loads it, which must fail here: the stand-in has none of the functions.
TRITON_CACHE_DIR=$folder TRITON_LIBCUDA_PATH=$stand_in python -c '
from triton.backends.nvidia.driver import CudaUtils
try:
    CudaUtils()
except ImportError as error:
    print("made, not loaded:", error)'
find "$folder" -name 'cuda_utils*.so' | grep .
chmod -R a+rX "$folder"
