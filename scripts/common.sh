# shellcheck shell=bash
# What the numbered scripts share; sourced by each. Settings come from one env file, configs/*.env:
#     bash scripts/02_retrieve.sh configs/demo.env
# and a variable set in the environment wins over the file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CONFIG=${1:-${CONFIG:-configs/llama3_8b.env}}
[[ -f $CONFIG ]] || { echo "error: $CONFIG: no such settings file; see configs/" >&2; exit 2; }
ASKED_WORK=${WORK:-}
# shellcheck source=configs/llama3_8b.env
source "$CONFIG"

[[ $WORK == "${ASKED_WORK:-$WORK}" ]] || { echo "error: $CONFIG sets WORK over the environment; write WORK=\${WORK:-...}" >&2; exit 2; }

PATH="$PWD/.venv/bin:$PATH"
LLAMAFACTORY=${LLAMAFACTORY:-.venv-train/bin/llamafactory-cli}
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
# Models in folders never need a hub; HF_HUB_OFFLINE=0 lets hub names be looked up.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# The GPUs to use: CUDA_VISIBLE_DEVICES where it is set, else all of the machine. A shard takes GPUS_PER_SHARD of them.
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra GPUS <<<"$CUDA_VISIBLE_DEVICES"
else
    mapfile -t GPUS < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true)
fi
GPUS_PER_SHARD=${GPUS_PER_SHARD:-1}
NUM_SHARDS=${NUM_SHARDS:-$((${#GPUS[@]} / GPUS_PER_SHARD))}
((NUM_SHARDS > 0)) || NUM_SHARDS=1
gpus_of() { # SHARD
    ((${#GPUS[@]})) || return 0
    local IFS=, first=$(($1 * GPUS_PER_SHARD % ${#GPUS[@]}))
    echo "${GPUS[*]:first:GPUS_PER_SHARD}"
}
# Flags of every stage that writes a prompt.
PROMPT_FLAGS=()
# shellcheck disable=SC2034  # used by the scripts that source this
[[ -z ${PROMPTS:-} ]] || PROMPT_FLAGS=(--prompts "$PROMPTS")
MODEL_DIR=$WORK/DynamicRAG_$MODEL
# The model that samples and that DPO starts from, and the DPO recipe: dpo, dpo_ftx or simpo.
POLICY=${POLICY:-$MODEL_DIR/sft}
DPO_RECIPE=${DPO_RECIPE:-dpo}

# needs FILE SCRIPT: end here, naming the script that makes FILE, where it is missing.
needs() {
    [[ -e $1 ]] || { echo "error: $1 is missing; make it with: bash $2 $CONFIG" >&2; exit 2; }
}

# given VARIABLE: end here where the file a setting names is not there.
given() {
    [[ -e ${!1} ]] || { echo "error: ${!1} is missing; $CONFIG names it as $1${MAKER:+; $MAKER makes it}" >&2; exit 2; }
}

# sharded INPUT OUTPUT COMMAND...: run COMMAND, with {in} and {out} in it replaced, on one part of INPUT a GPU at the
# same time, and put the parts together. A part that fails is named with its log; the others finish, and running again
# does only what is missing.
sharded() {
    local input=$1 output=$2 parts=$2.parts started=() part shard
    shift 2
    if ((NUM_SHARDS == 1)); then
        run_part "$input" "$output" "$@"
        return
    fi
    mkdir -p "$parts"
    python split_data.py --input_file "$input" --output_dir "$parts/in" --num_splits "$NUM_SHARDS"
    for part in "$parts"/in/split_*.json; do
        [[ $part == *.manifest.json ]] && continue
        shard=$(basename "$part" .json)
        shard=${shard#split_}
        CUDA_VISIBLE_DEVICES=$(gpus_of "$shard") run_part "$part" "$parts/out_$shard.jsonl" "$@" >"$parts/$shard.log" 2>&1 &
        started+=("$!:$shard:$parts/$shard.log")
    done
    await_parts "${started[@]}"
    python aggregate.py --input_files "$parts/out_*.jsonl" --splits_dir "$parts/in" --output_file "$output"
}

# retrieve QUESTIONS OUTPUT: the questions with the documents of the settings' retriever.
retrieve() {
    # shellcheck disable=SC2086  # RETRIEVER_FLAGS and SEARCH_FLAGS are lists of flags
    sharded "$1" "$2" python retriever.py --model_name_or_path "$RETRIEVER" $RETRIEVER_FLAGS --passages "$PASSAGES" \
        --passages_embeddings "$EMBEDDINGS/*" --query '{in}' --output_file '{out}' --n_docs "$N_DOCS_RETRIEVED" $SEARCH_FLAGS
}

# divided COMMAND FILE...: COMMAND on the files, divided among the GPUs; each calls it once, with its part of them.
divided() {
    local command=$1 started=() shard number log files
    shift
    if ((NUM_SHARDS == 1)); then
        "$command" "$@"
        return
    fi
    mkdir -p "$WORK/logs"
    for ((shard = 0; shard < NUM_SHARDS && shard < $#; shard++)); do
        files=()
        for ((number = shard + 1; number <= $#; number += NUM_SHARDS)); do files+=("${!number}"); done
        log=$WORK/logs/$command.$shard.log
        CUDA_VISIBLE_DEVICES=$(gpus_of "$shard") "$command" "${files[@]}" >"$log" 2>&1 &
        started+=("$!:$shard:$log")
    done
    await_parts "${started[@]}"
}

# await_parts PID:NUMBER:LOG...: wait for all of them; end here where one failed, naming its log.
await_parts() {
    local started pid number log failed=0
    for started in "$@"; do
        IFS=: read -r pid number log <<<"$started"
        wait "$pid" || { echo "error: part $number failed; its log is $log" >&2; failed=1; }
    done
    ((failed == 0)) || exit 1
}

# newest_model: the folder of the DPO model where there is one, else of the SFT model.
newest_model() { if [[ -f $MODEL_DIR/dpo/config.json ]]; then echo "$MODEL_DIR/dpo"; else echo "$MODEL_DIR/sft"; fi; }

run_part() {
    local in=$1 out=$2
    shift 2
    local command=("${@//\{in\}/$in}")
    "${command[@]//\{out\}/$out}"
}

# version_of MODEL: the file by which a model trained anew is told from the one before; none of a hub's.
version_of() {
    local file
    for file in trainer_state.json config.json; do  # the first is of a model that LLaMA-Factory trained
        [[ ! -f $1/$file ]] || { echo "$1/$file"; return; }
    done
}

# train STAGE RECIPE DATA... -- KEY=VALUE...: one LLaMA-Factory run of recipes/$MODEL/RECIPE.yaml on files of this run. An
# interrupted one continues from its last checkpoint, unless its data has changed; trained_on.sha256 marks completion.
train() {
    local folder=$MODEL_DIR/$1 recipe=recipes/$MODEL/$2.yaml data=()
    shift 2
    while [[ $1 != -- ]]; do data+=("$1"); shift; done
    shift
    [[ -f $recipe ]] || { echo "error: $recipe: no such recipe" >&2; exit 2; }
    local begun=$folder/training_on.sha256 finished=$folder/trained_on.sha256 settings=$folder/settings.txt sums
    for sums in "$begun" "$finished"; do
        if [[ -f $sums ]] && ! { sha256sum --check --status "$sums" && [[ "$recipe $*" == "$(cat "$settings")" ]]; }; then
            echo "error: $folder was trained on other data or with other settings; move it away to train anew" >&2
            exit 2
        fi
    done
    [[ -f $finished ]] && { echo "$folder is trained already" >&2; return; }
    [[ -x $LLAMAFACTORY ]] || { echo "error: $LLAMAFACTORY is missing; make it with: bash scripts/setup.sh" >&2; exit 2; }
    mkdir -p "$WORK/recipes" "$folder"
    [[ $WORK == . ]] || cp recipes/dataset_info.json "$WORK/recipes/"
    echo "$recipe $*" >"$settings"
    sha256sum "$recipe" "${data[@]}" >"$begun"
    (
        local device=()
        if ((${#GPUS[@]})); then
            ! grep -q '^use_cpu: true' "$recipe" || device=(use_cpu=false flash_attn=auto)  # the small model's recipes are a CPU's
        else
            # Training spends a fifth of its time on memory that is given back to the system and asked for again: it is kept,
            # in huge pages.
            export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=68719476736}
        fi
        DISABLE_VERSION_CHECK=1 "$LLAMAFACTORY" train "$recipe" dataset_dir="$WORK/recipes" output_dir="$folder" "${device[@]}" "$@"
    )
    mv "$begun" "$finished"
    rm -rf "$folder"/checkpoint-*
}
