#!/usr/bin/env bash
# Check everything that needs a GPU: exact search, encoder, reranker, BERTScore, training and the engine. The machine needs one GPU,
# torch and transformers, and no network. The log names each part that is skipped because a library is missing.
#     bash scripts/gpu_check.sh [--minutes 9] [--dry] [--only PART...] [--list] [--wheels DIR] [--output DIR]
#     bash scripts/gpu_check.sh --pack DIR      on a machine with network: download the missing wheels; use them with --wheels DIR
set -euo pipefail
STARTED=$(date +%s.%N)
cd "$(dirname "$0")/.."

# The wheels are for Python 3.12 on Linux x86_64, in two folders of at most 60 MiB: DIR/1 for the pipeline, DIR/2 for LLaMA-Factory.
PIPELINE=(orjson==3.13.0 datasets==4.0.0 dill==0.3.8 multiprocess==0.70.16 fsspec==2025.3.0 bert-score==0.3.13)
TRAINING=(llamafactory==0.9.5 transformers==5.6.0 tokenizers==0.22.2 accelerate==1.11.0 peft==0.18.1 trl==0.24.0 omegaconf==2.4.0
    pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5 hjson==3.1.0)
pack() { # DIR
    local dir=$1 platforms=(--platform manylinux1_x86_64 --platform manylinux2014_x86_64) minor python=${PYTHON:-python3} size
    for minor in 5 12 17 24 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done  # pip accepts only exact matches
    local download=("$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}")
    mkdir -p "$dir/1" "$dir/2"
    "${download[@]}" --dest "$dir/1" "${PIPELINE[@]}"
    "${download[@]}" --dest "$dir/2" "${TRAINING[@]}"
    # DeepSpeed is published only as source. Without compiled operators, its wheel fits every version of Python.
    DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --wheel-dir "$dir/2" deepspeed==0.19.8
    for piece in 1 2; do
        size=$(du -sm "$dir/$piece" | cut -f1)
        echo "$dir/$piece: $size MiB" >&2
        ((size <= 60)) || { echo "error: $dir/$piece: larger than 60 MiB; move some wheels to another folder" >&2; exit 1; }
    done
}

if [[ ${1:-} == --pack ]]; then
    [[ -n ${2:-} ]] || { echo "error: --pack: the folder is missing; write --pack DIR" >&2; exit 2; }
    pack "$2"
    exit
fi
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ ! -x .venv/bin/python ]] || PYTHON=$PWD/.venv/bin/python
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m gpu_check --started "$STARTED" "$@"
