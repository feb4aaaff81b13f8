#!/usr/bin/env bash
# Downloads the wheels that a CUDA machine without network (Python 3.12, x86-64) lacks: fetch_wheels.sh [DIR]
# DIR (./wheels) is what hf_fp8 needs (20 MB); DIR/peers is torchao, to compare with, kept apart so that nothing else imports it.
set -euo pipefail
dir=${1:-$(dirname "$0")/wheels}
mkdir -p "$dir/peers"
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17; do platforms+=(--platform "${tag}_x86_64"); done
fetch() { # FOLDER SPEC...
  local to=$1; shift
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d "$to" "$@"
}
# typing_extensions: pydantic wants 4.16. tokenizers 0.23.2, huggingface_hub 1.33 and safetensors 0.8, which are there, do.
fetch "$dir" transformers==5.23.0 compressed-tensors==0.20.0 loguru==0.7.3 \
  pydantic==2.14.3 pydantic_core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5 typing_extensions==4.16.0
fetch "$dir/peers" torchao==0.18.0
du -sh "$dir"
