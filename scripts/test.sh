#!/usr/bin/env bash
# Set up, then run all tests: lint, units, and the whole chain on tiny models through the real engine and trainer.
#     bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/ruff check .
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
.venv/bin/python -m pytest "$@"
