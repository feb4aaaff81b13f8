#!/usr/bin/env bash
# Measures everything on a CUDA machine, with the wheels of ./wheels: day.sh OUT [--dry] [--only STEP ...] [--seconds N]
set -u
here=$(cd "$(dirname "$0")" && pwd)
out=$(realpath -m "${1:?usage: day.sh OUT [--dry] [--only STEP ...] [--seconds N]}")
python=${PYTHON:-python3}
cd "$here/../.."
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
install() { # FOLDER FILE...
  local to=$1; shift
  [ -e "$1" ] || return 0
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$to" "$@" 2>&1 | grep -v WARNING
}
install "$site/own" "$here"/wheels/*.whl
install "$site/peers" "$here"/wheels/peers/*.whl # apart: only the linears' step imports them
export PYTHONPATH="$site/own:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TRITON_CACHE_DIR="$site/triton"
[ -d "$site/peers" ] && export DAY_PEERS="$site/peers"
"$python" -m benchmarks.gpu_day.day "$out" "${@:2}"
