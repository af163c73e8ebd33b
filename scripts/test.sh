#!/usr/bin/env bash
# Set up, then run all tests: lint, types, units, and the whole chain on tiny models through the real engine and trainer.
#     bash scripts/test.sh                       all tests
#     bash scripts/test.sh --fast                lint, types, and the tests that start neither an engine nor a trainer, each under 10 s
#     bash scripts/test.sh [pytest arguments]
#     FULL=1 bash scripts/test.sh                every malformed file on every stage, not a few of them
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
# The report is tested in a browser too: in the one there is, or in Debian's Chromium where it may be installed.
if ! command -v chromium chromium-browser google-chrome >/dev/null && ((EUID == 0)) && command -v apt-get >/dev/null; then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null ||
        echo "Chromium could not be installed: the tests in a browser are skipped" >&2
fi
.venv/bin/ruff check .
.venv/bin/pyright --project pyproject.toml
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# All of them: one process per core, a file at a time, since the tests of a file share the models they make.
parallel=(--numprocesses "$(nproc)" --dist loadfile --no-loadscope-reorder)
case ${1:-} in
    "") set -- "${parallel[@]}" ;;
    --fast) set -- "${parallel[@]}" -m "not slow" "${@:2}" ;;
esac
.venv/bin/python -m pytest "$@"
