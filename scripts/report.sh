#!/usr/bin/env bash
# Results -> one HTML page with tables, the figures of the paper, and a browser of cases. It opens from disk and needs no network.
#     bash scripts/report.sh runs/demo_default/results [--cases 500]
set -euo pipefail
cd "$(dirname "$0")/.."
[[ ${1:-} ]] || { echo "usage: bash scripts/report.sh RESULTS_DIR [flags of python -m dynamicrag.report]" >&2; exit 2; }
PATH="$PWD/.venv/bin:$PATH"
python -m dynamicrag.report "$@"
