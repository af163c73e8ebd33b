#!/usr/bin/env bash
# Set up, then run all tests: lint, types, units, and the whole chain on tiny models with the real engine and trainer.
#     bash scripts/test.sh                       all tests
#     bash scripts/test.sh --fast                lint, types, and the tests that start neither an engine nor a trainer, each under 4 s
#     bash scripts/test.sh [pytest arguments]
#     FULL=1 bash scripts/test.sh                all tests, with every malformed file on every stage instead of a few, and four families of models
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
# The report is also tested in a browser. If there is none, root installs Debian's Chromium.
if ! command -v chromium chromium-browser google-chrome >/dev/null && ((EUID == 0)) && command -v apt-get >/dev/null; then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null ||
        echo "warning: Chromium: cannot be installed; the tests in a browser are skipped" >&2
fi
.venv/bin/ruff check .
types=$(mktemp)
trap 'kill $checking 2>/dev/null || true; rm -f "$types"' EXIT
.venv/bin/pyright --project pyproject.toml >"$types" 2>&1 &  # it uses one core only, so it runs beside the tests
checking=$!
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# One process per core. A process runs whole files, because the tests of a file share the models that they make.
parallel=(--numprocesses "$(nproc)" --dist loadfile --no-loadscope-reorder)
case ${1:-} in
    "") set -- "${parallel[@]}" ;;
    --fast)
        export KILLS=${KILLS:-1}  # kills of each stage; 3 otherwise
        set -- "${parallel[@]}" -m "not slow" "${@:2}"
        ;;
esac
status=0
.venv/bin/python -m pytest "$@" || status=$?
wait "$checking" || status=1
echo "types: $(cat "$types")"
exit "$status"
