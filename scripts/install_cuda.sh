#!/usr/bin/env bash
# usage: install_cuda.sh FOLDER
#
# Puts the CUDA compiler and the static runtime into FOLDER, from the Python packages that carry them, so that a bare
# manylinux container can build wheels: FOLDER/bin has to be in PATH then.
set -euo pipefail
folder=$1
python=$(command -v python3 || ls -d /opt/python/cp313-cp313/bin/python)
packages=$(mktemp -d)
"$python" -m pip install --quiet --no-deps --target "$packages" \
  nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 \
  nvidia-cuda-cccl==13.0.85 nvidia-cuda-culibos==13.0.85
mkdir -p "$folder"
cp -a "$packages"/nvidia/cu13/. "$folder"
rm -r "$packages"
ln -sfn lib "$folder/lib64" # where nvcc looks
chmod +x "$folder"/bin/* "$folder"/nvvm/bin/*
"$folder/bin/nvcc" --version
