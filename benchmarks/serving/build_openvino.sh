#!/usr/bin/env bash
# Installs OpenVINO GenAI, and optimum-intel to convert models for it, in a Python environment of its own.
#
#   benchmarks/serving/build_openvino.sh [FOLDER]
#
# FOLDER defaults to ~/.cache/spec_kd/tools/openvino. It then holds .venv. optimum-intel pins a version of transformers
# that is not this project's; that is why it has its own environment. A finished environment is left as it is.
set -euo pipefail

version="2026.4.1.0"
folder="${1:-$HOME/.cache/spec_kd/tools/openvino}"
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
if [ -f "$folder/version" ] && [ "$(cat "$folder/version")" = "$version" ]; then
    echo "OpenVINO GenAI $version is ready in $folder"
    exit 0
fi

python3 -m venv "$folder/.venv"
pip="$folder/.venv/bin/pip"
"$pip" install --quiet --upgrade pip
"$pip" install --quiet "openvino-genai==$version" "optimum-intel[openvino]==2.2.0"
# Text models do not need it, and its wheel on PyPI does not fit every build of torch
"$pip" uninstall --quiet --yes torchvision
"$folder/.venv/bin/python" -c "import openvino_genai; print('OpenVINO GenAI', openvino_genai.get_version())"
echo "$version" > "$folder/version"
echo "OpenVINO GenAI $version is ready in $folder"
