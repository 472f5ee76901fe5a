#!/usr/bin/env bash
# Installs MLX-LM with MLX's CPU backend for Linux, in a Python environment of its own.
#
#   benchmarks/serving/build_mlx.sh [FOLDER]
#
# FOLDER defaults to ~/.cache/spec_kd/tools/mlx. It then holds .venv. A finished environment is left as it is.
set -euo pipefail

version="0.32.2"
folder="${1:-$HOME/.cache/spec_kd/tools/mlx}"
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
if [ -f "$folder/version" ] && [ "$(cat "$folder/version")" = "$version" ]; then
    echo "MLX-LM $version is ready in $folder"
    exit 0
fi

python3 -m venv "$folder/.venv"
pip="$folder/.venv/bin/pip"
"$pip" install --quiet --upgrade pip
"$pip" install --quiet "mlx[cpu]==0.32.4" "mlx-lm==$version"
"$folder/.venv/bin/python" -c "import mlx_lm, mlx.core as mx; print('MLX-LM', mlx_lm.__version__, mx.default_device())"
echo "$version" > "$folder/version"
echo "MLX-LM $version is ready in $folder"
