#!/usr/bin/env bash
# Collects the wheels that an offline GPU machine needs for this project beyond torch, triton, transformers, pytest,
# hypothesis, matplotlib and what these and the usual scientific packages bring along. For Linux on x86-64, about 6 MB.
#   benchmarks/offline_wheels.sh DIR [PYTHON_VERSION [PACKAGE ...]]
# PYTHON_VERSION is the GPU machine's (default 3.12); PACKAGE is what else it lacks, for example xxhash, einops or msgpack.
# There, in the repository:
#   python3 -m pip install --no-index --no-deps --target /tmp/site DIR/*.whl
#   export PYTHONPATH=/tmp/site:$PWD/kernels
set -euo pipefail
dir=${1:?usage: offline_wheels.sh DIR [PYTHON_VERSION [PACKAGE ...]]}
download=(python3 -m pip download -q -d "$dir" --only-binary=:all: --implementation cp --python-version "${2:-3.12}")
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux2010 manylinux1; do
  download+=(--platform "${tag}_x86_64")
done
mkdir -p "$dir"
# DeepSpeed is published as source. Without compiled operators, which this project does not use, its wheel fits every Python.
DS_BUILD_OPS=0 python3 -m pip wheel -q --no-deps -w "$dir" 'deepspeed>=0.19.8,<0.20'
"${download[@]}" 'pydantic>=2.7,<3' # with the one pydantic-core that fits
"${download[@]}" --no-deps hjson 'datasets>=5.2,<6' 'dill<0.4.2' 'multiprocess<0.70.20' "${@:3}"
ls -l "$dir"
