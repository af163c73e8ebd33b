# shellcheck shell=bash
# What the numbered scripts share; sourced by each. Settings come from one env file, configs/*.env:
#     bash scripts/02_retrieve.sh configs/demo.env
# and a variable set in the environment wins over the file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# refuse MESSAGE: end here; the message is one line, "<place>: <what is wrong>; <what to do>".
refuse() {
    echo "error: $*" >&2
    exit 2
}
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || refuse "bash $BASH_VERSION: too old; the scripts need bash 4.4 or newer"

CONFIG=${1:-${CONFIG:-configs/llama3_8b.env}}
[[ -f $CONFIG ]] || refuse "$CONFIG: no such settings file; see configs/"
ASKED_WORK=${WORK:-}
# shellcheck source=configs/llama3_8b.env
source <(tr -d '\r' <"$CONFIG")  # an editor on Windows ends lines with a carriage return

[[ $WORK == "${ASKED_WORK:-$WORK}" ]] || refuse "$CONFIG sets WORK over the environment; write WORK=\${WORK:-...}"

PATH="$PWD/.venv/bin:$PATH"
export PYTHONUNBUFFERED=1
# Models in folders never need a hub; HF_HUB_OFFLINE=0 lets hub names be looked up.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

source scripts/workers.sh  # GPUs, and the parts of a file
source scripts/training.sh  # runs of LLaMA-Factory

# Flags of every stage that writes a prompt.
PROMPT_FLAGS=()
# shellcheck disable=SC2034  # used by the scripts that source this
[[ -z ${PROMPTS:-} ]] || PROMPT_FLAGS=(--prompts "$PROMPTS")
MODEL_DIR=$WORK/DynamicRAG_$MODEL
# The model that samples and that DPO starts from, and the recipes of recipes/$MODEL: sft, sft_lora or sft_qlora; dpo, dpo_ftx,
# simpo, dpo_lora or dpo_qlora.
POLICY=${POLICY:-$MODEL_DIR/sft}
SFT_RECIPE=${SFT_RECIPE:-sft}
DPO_RECIPE=${DPO_RECIPE:-dpo}

# The evaluation sets, as SET=FILE: EVAL_QUESTIONS get their documents here, the rows of EVAL_FILES have some already. A set is called
# by the name of its file, and so are its results.
stem() { basename "${1%.*}"; }
with_folder() { echo "$(dirname "$1")/$(basename "$(realpath -sm "$(dirname "$1")")")_$(basename "$1")"; }
SETS=()
# shellcheck disable=SC2153  # both are settings
for file in ${EVAL_QUESTIONS:-} ${EVAL_FILES:-}; do
    name=$(stem "$file")
    for other in "${SETS[@]}"; do
        [[ ${other%%=*} != "$name" ]] || refuse "${other#*=} and $file: two evaluation sets are called $name, and would write the same files;" \
            "rename one so that its name keeps the data set (EVAL_QUESTIONS, EVAL_FILES): $(with_folder "$file")"
    done
    SETS+=("$name=$file")
done
SET_NAMES=("${SETS[@]%%=*}")

# given_inputs: end here if a file that the settings name for the first stages is not there.
given_inputs() {
    local set
    given PASSAGES
    given TRAIN_QUESTIONS
    for set in "${SETS[@]}"; do
        [[ -e ${set#*=} ]] || refuse "${set#*=} is missing; $CONFIG names it as an evaluation set${MAKER:+; $MAKER makes it}"
    done
}

# needs FILE SCRIPT: end here if FILE is missing, naming the script that makes it.
needs() {
    [[ -e $1 ]] || refuse "$1 is missing; make it with: bash $2 $CONFIG"
}

# given VARIABLE: end here if the file that a setting names is not there.
given() {
    [[ -e ${!1} ]] || refuse "${!1} is missing; $CONFIG names it as $1${MAKER:+; $MAKER makes it}"
}

# reranked_sets: in RERANKED_SETS, the file of each evaluation set with the reranker's scores; end here if one is missing.
reranked_sets() {
    local name
    RERANKED_SETS=()
    for name in "${SET_NAMES[@]}"; do
        needs "$WORK/eval_data/$name.jsonl" scripts/03_rerank.sh
        RERANKED_SETS+=("$WORK/eval_data/$name.jsonl")
    done
}

# retrieve QUESTIONS OUTPUT: the questions with the documents of the settings' retriever.
retrieve() {
    # shellcheck disable=SC2086  # RETRIEVER_FLAGS and SEARCH_FLAGS are lists of flags
    sharded "$1" "$2" python retriever.py --model_name_or_path "$RETRIEVER" ${RETRIEVER_FLAGS:-} --passages "$PASSAGES" \
        --passages_embeddings "$EMBEDDINGS/*" --query '{in}' --output_file '{out}' --n_docs "$N_DOCS_RETRIEVED" ${SEARCH_FLAGS:-}
}

# infer MODEL OUTPUT SELECTORS N FILE...: the questions of the evaluation files answered by MODEL from what each of SELECTORS chooses
# among the first N documents; OUTPUT names the results with {input} and {selector}.
infer() { answer inference.py "$1" "$2" selector "$3" --topn "$4" -- "${@:5}"; }

# answer SCRIPT MODEL OUTPUT CHOICE VALUES FLAG... -- FILE...: SCRIPT (inference.py or top_inference.py) with MODEL on evaluation
# files, once for each of the VALUES of its flag CHOICE; OUTPUT names the results with {input} and {CHOICE}. The questions of
# every file are divided: a worker gets a part of all files, so it loads the model once, and the answers are put together.
answer() {
    local script=$1 model=$2 output=$3 choice=$4 values=$5 parts logs flags=() whole=() divided=() numbers=() file part total
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
            mkdir -p "$parts/in/$part"  # a link, by which a part has the name of its file
            ln -sfn "../../split/$(stem "$file")/split_$part.json" "$parts/in/$part/$(stem "$file").json"
            numbers+=("$part")
        done
    done
    [[ ${#whole[@]} == 0 || -n $SHARDS ]] || ask "$output" "${output%.json}_remain.json" "${whole[@]}"
    ((${#divided[@]})) || return 0
    mapfile -t numbers < <(printf '%s\n' "${numbers[@]}" | sort -nu)
    # The log of a part is of all files and values: it is called by what the names of their results share.
    logs=$(basename "$output" .json | sed -E 's/\{[a-z]+\}//g; s/_+/_/g; s/^_|_$//g')
    in_pool ask_part "$parts/${logs:-answers}." "${numbers[@]}"
    later "$output" || join_answers
}
ask() { # OUTPUT REMAIN FILE...
    # shellcheck disable=SC2086  # ENGINE_FLAGS and the values are lists
    python "$script" "${PROMPT_FLAGS[@]}" --template "$TEMPLATE" --llm-model "$model" --input-json "${@:3}" --output-json "$1" \
        --remain-output-json "$2" "${flags[@]}" ${ENGINE_FLAGS:-} "--$choice" $values
}
ask_part() { # PART: of every file that has such a part
    local file files=()
    for file in "${divided[@]}"; do
        file=$parts/in/$1/$(stem "$file").json
        [[ ! -e $file ]] || files+=("$file")
    done
    ask "$parts/$(basename "$output" .json).$1.json" "$parts/$(basename "$output" .json)_remain.$1.json" "${files[@]}"
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
result_of() { # FILE VALUE: the path that SCRIPT writes
    local path=${output//\{input\}/$(stem "$1")}
    echo "${path//\{$choice\}/${2//:/}}"
}
# parts_of_answers FILE: one if some of its results were begun as a whole, and none in parts; else as parts_of says.
parts_of_answers() {
    local value result
    for value in $values; do
        result=$(result_of "$1" "$value")
        ! begun "$result" || compgen -G "$parts/$(basename "$result" .json).[0-9]*.manifest.json" >/dev/null || { echo 1; return; }
    done
    parts_of "" "$parts/split/$(stem "$1")"
}

# newest_model: the folder of the DPO model where there is one, else of the SFT model.
newest_model() { if [[ -f $MODEL_DIR/dpo/config.json ]]; then echo "$MODEL_DIR/dpo"; else echo "$MODEL_DIR/sft"; fi; }
