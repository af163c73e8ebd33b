# shellcheck shell=bash
# Functions and settings of the numbered scripts, each of which sources this file. The settings come from one file, configs/*.env:
#     bash scripts/02_retrieve.sh configs/demo.env
# A variable that is set in the environment overrides the file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# refuse MESSAGE: print an error and exit with status 2. The message is one line, "<place>: <what is wrong>; <what to do>".
refuse() {
    echo "error: $*" >&2
    exit 2
}
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || refuse "bash $BASH_VERSION: too old; use bash 4.4 or newer"

CONFIG=${1:-${CONFIG:-configs/llama3_8b.env}}
[[ -f $CONFIG ]] || refuse "$CONFIG: this settings file does not exist; choose one of configs/"
ASKED_WORK=${WORK:-}
# shellcheck source=configs/llama3_8b.env
source <(tr -d '\r' <"$CONFIG")  # without the carriage returns of editors on Windows

[[ $WORK == "${ASKED_WORK:-$WORK}" ]] || refuse "$CONFIG: overrides WORK of the environment; write WORK=\${WORK:-...} in the file"

PATH="$PWD/.venv/bin:$PATH"
export PYTHONUNBUFFERED=1
# A model in a folder needs no hub. HF_HUB_OFFLINE=0 allows names of models on a hub.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# An experiment tracker for the trainer and the other stages: wandb, tensorboard, trackio or mlflow. What it is told stays in
# TRACKING_DIR, unless the tracker's own variables say otherwise.
export REPORT_TO=${REPORT_TO:-none} TRACKING_DIR=${TRACKING_DIR:-$WORK/tracking}
[[ $REPORT_TO == @(none|wandb|tensorboard|trackio|mlflow) ]] || refuse "REPORT_TO=$REPORT_TO: expected wandb, tensorboard, trackio, mlflow or none"

source scripts/workers.sh  # GPUs, workers and the parts of a file
source scripts/training.sh  # training with LLaMA-Factory

# Flags of every stage that writes a prompt.
PROMPT_FLAGS=()
# shellcheck disable=SC2034  # the scripts that source this file use it
[[ -z ${PROMPTS:-} ]] || PROMPT_FLAGS=(--prompts "$PROMPTS")
MODEL_DIR=$WORK/DynamicRAG_$MODEL
# POLICY samples the trajectories, and the training from them starts from it. The recipes are files of recipes/$MODEL: sft, sft_lora or
# sft_qlora for SFT; dpo, dpo_ftx, simpo, dpo_lora, dpo_qlora, best_of_n, best_of_n_lora, kto or kto_lora for training from trajectories.
POLICY=${POLICY:-$MODEL_DIR/sft}
SFT_RECIPE=${SFT_RECIPE:-sft}
DPO_RECIPE=${DPO_RECIPE:-dpo}
# ROLES=reranker or ROLES=generator trains a model for one role only. Its folder is sft_reranker, dpo_generator, ...
ROLES=${ROLES:-reranker generator}
[[ $ROLES == @(reranker|generator|"reranker generator") ]] || refuse "ROLES=\"$ROLES\": expected reranker, generator, or \"reranker generator\""
# shellcheck disable=SC2034  # the scripts that source this file use it
OF_ROLES=$([[ $ROLES == *" "* ]] || echo "_$ROLES")

# The evaluation sets, as SET=FILE. EVAL_QUESTIONS are files of questions, for which documents are retrieved; the rows of EVAL_FILES
# already have documents. A set has the name of its file, and the files of its results begin with this name.
stem() { basename "${1%.*}"; }
with_folder() { echo "$(dirname "$1")/$(basename "$(realpath -sm "$(dirname "$1")")")_$(basename "$1")"; }
SETS=()
# shellcheck disable=SC2153  # settings, not misspelt variables
for file in ${EVAL_QUESTIONS:-} ${EVAL_FILES:-}; do
    name=$(stem "$file")
    for other in "${SETS[@]}"; do
        [[ ${other%%=*} != "$name" ]] || refuse "${other#*=} and $file: two evaluation sets have the name $name and would write the same files;" \
            "rename one in EVAL_QUESTIONS or EVAL_FILES, for example to $(with_folder "$file"), which still names the data set"
    done
    SETS+=("$name=$file")
done
SET_NAMES=("${SETS[@]%%=*}")

# given_inputs: exit with an error if an input file of the first stages does not exist.
given_inputs() {
    local set
    given PASSAGES
    given TRAIN_QUESTIONS
    for set in "${SETS[@]}"; do
        [[ -e ${set#*=} ]] || refuse "${set#*=}: does not exist, but is an evaluation set of $CONFIG; ${MAKER:+make it with $MAKER, or }correct the setting"
    done
}

# needs FILE SCRIPT: exit with an error if FILE does not exist. The error names SCRIPT, which makes it.
needs() {
    [[ -e $1 ]] || refuse "$1: does not exist; make it with: bash $2 $CONFIG"
}

# given VARIABLE: exit with an error if the file that this setting names does not exist.
given() {
    [[ -e ${!1} ]] || refuse "${!1}: does not exist, but is $1 of $CONFIG; ${MAKER:+make it with $MAKER, or }correct the setting"
}

# reranked_sets: set RERANKED_SETS to the reranked files of all evaluation sets. Exits with an error if one does not exist.
reranked_sets() {
    local name
    RERANKED_SETS=()
    for name in "${SET_NAMES[@]}"; do
        needs "$WORK/eval_data/$name.jsonl" scripts/03_rerank.sh
        RERANKED_SETS+=("$WORK/eval_data/$name.jsonl")
    done
}

# retrieve QUESTIONS OUTPUT: retrieve documents for the questions, as the settings say.
retrieve() {
    # shellcheck disable=SC2086  # RETRIEVER_FLAGS and SEARCH_FLAGS are lists of flags
    sharded "$1" "$2" python retriever.py --model_name_or_path "$RETRIEVER" ${RETRIEVER_FLAGS:-} --passages "$PASSAGES" \
        --passages_embeddings "$EMBEDDINGS/*" --query '{in}' --output_file '{out}' --n_docs "$N_DOCS_RETRIEVED" ${SEARCH_FLAGS:-}
}

# rerank INPUT OUTPUT: the rows with the scores and labels of the settings' reranker.
rerank() {
    # shellcheck disable=SC2086  # RERANK_FLAGS is a list of flags
    sharded "$1" "$2" python reranker.py --model_name_or_path "$RERANKER" --input_file '{in}' --output_file '{out}' \
        --device auto ${RERANK_FLAGS:-}
}

# infer MODEL OUTPUT SELECTORS N FILE...: answer the questions of the evaluation files with MODEL, once per selector. Each selector
# chooses among the first N documents. OUTPUT is the path of the results, with {input} and {selector} in it.
infer() { answer inference.py "$1" "$2" selector "$3" --topn "$4" -- "${@:5}"; }

# answer SCRIPT MODEL OUTPUT CHOICE VALUES FLAG... -- FILE...: run SCRIPT (inference.py or top_inference.py) with MODEL on the
# evaluation files, once for each of the VALUES of its flag CHOICE. OUTPUT is the path of the results, with {input} and {CHOICE} in
# it. Every file is divided into parts. A worker gets one part of all files, so that it loads the model once. At the end the answers
# of the parts are joined.
answer() {
    local script=$1 model=$2 output=$3 choice=$4 values=$5 parts logs flags=() whole=() divided=() numbers=() made file part total
    shift 5
    while [[ $1 != -- ]]; do flags+=("$1"); shift; done
    shift
    parts=$(dirname "$output")/parts
    for file in "$@"; do
        total=$(parts_of_answers "$file")
        if ((total == 1)); then
            whole+=("$file")
            continue
        fi
        divided+=("$file")
        split "$file" "$parts/split/$(stem "$file")" "$total"
        for part in $(parts_here "$parts/split/$(stem "$file")"); do
            mkdir -p "$parts/in/$part"  # the link gives the part the name of the whole file
            ln -sfn "../../split/$(stem "$file")/split_$part.json" "$parts/in/$part/$(stem "$file").json"
            numbers+=("$part")
        done
    done
    # One log per part covers all files and values. Its name is OUTPUT's without the placeholders.
    logs=$(basename "$output" .json | sed -E 's/\{[a-z]+\}//g; s/_+/_/g; s/^_|_$//g')
    mapfile -t made < <(made_by_parts)
    if only_join "${made[@]}"; then
        join_answers
        return
    fi
    [[ ${#whole[@]} == 0 || -n $SHARDS ]] || undivided ask_whole "$parts/${logs:-answers}.whole."
    ((${#divided[@]})) || return 0
    mapfile -t numbers < <(printf '%s\n' "${numbers[@]}" | sort -nu)
    in_pool ask_part "$parts/${logs:-answers}." "${numbers[@]}"
    later "$output" || join_answers
}
ask() { # OUTPUT REMAIN FILE...
    # shellcheck disable=SC2086  # ENGINE_FLAGS and the values are lists
    python "$script" "${PROMPT_FLAGS[@]}" --template "$TEMPLATE" --llm-model "$model" --input-json "${@:3}" --output-json "$1" \
        --remain-output-json "$2" "${flags[@]}" ${ENGINE_FLAGS:-} "--$choice" $values
}
ask_whole() { ask "$output" "${output%.json}_remain.json" "${whole[@]}"; }
ask_part() { # PART: of every file that has this part
    local file files=()
    for file in "${divided[@]}"; do
        file=$parts/in/$1/$(stem "$file").json
        [[ ! -e $file ]] || files+=("$file")
    done
    ask "$parts/$(basename "$output" .json).$1.json" "$parts/$(basename "$output" .json)_remain.$1.json" "${files[@]}"
}
made_by_parts() { # print the files that join_answers joins, and the results of undivided files
    local file value result part
    for value in $values; do
        for file in "${whole[@]}"; do result_of "$file" "$value"; done
        for file in "${divided[@]}"; do
            result=$(result_of "$file" "$value")
            for part in $(parts_here "$parts/split/$(stem "$file")"); do echo "$parts/$(basename "$result" .json).$part.json"; done
        done
    done
}
join_answers() {
    local file value result
    for file in "${divided[@]}"; do
        for value in $values; do
            result=$(result_of "$file" "$value")
            python aggregate.py --questions "$file" --splits_dir "$parts/split/$(stem "$file")" --output_file "$result" \
                --input_files "$parts/$(basename "$result" .json).[0-9]*.json"
        done
    done
}
result_of() { # FILE VALUE: print the path that SCRIPT writes
    local path=${output//\{input\}/$(stem "$1")}
    echo "${path//\{$choice\}/${2//:/}}"
}
# parts_of_answers FILE: print the number of parts. It is 1 if an earlier run started a result of FILE undivided; otherwise parts_of
# decides.
parts_of_answers() {
    local value result
    for value in $values; do
        result=$(result_of "$1" "$value")
        ! started "$result" || compgen -G "$parts/$(basename "$result" .json).[0-9]*.manifest.json" >/dev/null || { echo 1; return; }
    done
    parts_of "" "$parts/split/$(stem "$1")"
}

# newest_model: print the folder of the DPO model if there is one, otherwise that of the SFT model.
newest_model() { if [[ -f $MODEL_DIR/dpo/config.json ]]; then echo "$MODEL_DIR/dpo"; else echo "$MODEL_DIR/sft"; fi; }
