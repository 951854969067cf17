#!/usr/bin/env bash
# Everything that is to be measured when a GPU is at hand, part by part: docs/gpu.md.
#
#   benchmarks/gpu.sh                       all parts, LLaMA-2-7B's shape, within 16 GB of the GPU
#   benchmarks/gpu.sh derivation notebooks  these parts only
#   benchmarks/gpu.sh --rehearse            the same parts with a tiny shape on the CPU
#   benchmarks/gpu.sh --list                the parts, in their order
#
# Nothing is downloaded. Stopped at any time, it keeps what was measured; the same command goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-}
if [ -z "$python" ]; then
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
exec "$python" benchmarks/gpu_session.py "$@"
