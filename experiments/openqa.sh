#!/usr/bin/env bash
# Which training makes a model choose documents by the answers of a frozen generator? Real questions that need 0 to 4 documents
# (docs/openqa.md).
#     bash experiments/openqa.sh                              all pieces
#     UNTIL=gate bash experiments/openqa.sh                   up to the piece of this name
#     DATA=folder MODEL=folder RUN=folder bash experiments/openqa.sh
# Every piece takes under an hour on two cores and writes one file. A piece whose file exists is not repeated, and an interrupted piece
# continues with the same command. RUN/hours.tsv has the hours of each piece.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ -x .venv/bin/python ]] || bash scripts/setup.sh
source scripts/common.sh experiments/openqa/settings.env
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
OPENQA=experiments/openqa
GENERATOR=$RUN/generator/model/sft
mkdir -p "$RUN"

# piece NAME HOURS FILE COMMAND...: run COMMAND unless FILE, which it writes last, exists.
piece() {
    local name=$1 hours=$2 file=$3 began=$SECONDS
    shift 3
    if [[ ! -f $file ]]; then
        printf '\n== %s: about %s hours on two cores; writes %s\n' "$name" "$hours" "$file" >&2
        "$@"
        [[ -f $file ]] || refuse "$file: was not written by the piece $name; see the messages above"
        printf '%s\t%s\n' "$name" "$(python -c "print(round(($SECONDS - $began) / 3600, 2))")" >>"$RUN/hours.tsv"
    fi
    [[ ${UNTIL:-} != "$name" ]] || { echo "UNTIL=$UNTIL: the script ends after this piece" >&2; exit 0; }
}

# train_in FOLDER RECIPE DATASET FILE KEY=VALUE...: train FOLDER/model/RECIPE with FILE, which is the data set DATASET of dataset_info.json.
train_in() {
    local WORK=$1 MODEL_DIR=$1/model recipe=$2 dataset=$3 file=$4
    shift 4
    # shellcheck disable=SC2086  # TRAIN_FLAGS is a list of key=value settings
    train "$recipe" "$recipe" "$file" -- dataset="$dataset" "$@" ${TRAIN_FLAGS:-}
}

lists() {
    local group
    [[ -f $ENCODER/config.json ]] || python examples/factbook/models.py --output_dir "$(dirname "$ENCODER")"
    # shellcheck disable=SC2086  # SPLIT_FLAGS is a list of flags
    [[ -f $RUN/questions/reranker_searched.jsonl ]] || python $OPENQA/splits.py --data "$DATA" --output_dir "$RUN/questions" --seed "$SEED" $SPLIT_FLAGS
    for group in reranker asked; do
        python retriever.py --query "$RUN/questions/${group}_searched.jsonl" --passages "$PASSAGES" --passage_store "$RUN/passages.store" \
            --index bm25 --n_docs 20 --output_file "$RUN/questions/${group}_found.jsonl"
        cat "$RUN/questions/${group}_own.jsonl" "$RUN/questions/${group}_found.jsonl" >"$RUN/questions/$group.jsonl"
    done
    cat "$RUN/questions/reranker.jsonl" "$RUN/questions/asked.jsonl" >"$RUN/questions/all.jsonl"
    python examples/factbook/train_cross_encoder.py --input_file "$RUN/questions/all.jsonl" --encoder "$ENCODER" --output_dir "$RUN/cross-encoder" \
        --max_pairs "$RERANKER_PAIRS" --seed "$SEED"
    python reranker.py --model_name_or_path "$RUN/cross-encoder" --input_file "$RUN/questions/asked.jsonl" --output_file "$RUN/reranked.jsonl" \
        --n_docs 20 --max_length 256 --sort
    python $OPENQA/lists.py --input_file "$RUN/reranked.jsonl" --output_dir "$RUN/lists" --n_docs "$N_DOCS"
}

generator() {
    local folder=$RUN/generator number prompts
    python $OPENQA/contexts.py --input_file "$RUN/reranked.jsonl" --output_dir "$folder" --n_docs "$N_DOCS" --seed "$SEED"
    fit_to sft "$BASE"
    mkdir -p "$folder/training_data"
    for number in 1 2; do
        prompts=()
        ((number == 1)) || prompts=(--prompts "$OPENQA/wording_2.yaml")
        python construct_generator_sft.py "${FIT_FLAGS[@]}" "${prompts[@]}" --input_file "$folder/contexts_$number.jsonl" \
            --output_file "$folder/sft_$number.jsonl"
    done
    cat "$folder/sft_1.jsonl" "$folder/sft_2.jsonl" >"$folder/training_data/generator_sft_training.json"
    train_in "$folder" sft generator_sft "$folder/training_data/generator_sft_training.json" model_name_or_path="$BASE" seed="$SEED"
}

gate() {
    python $OPENQA/gate.py --input_file "$RUN/lists/dev.jsonl" --questions "$GATE_QUESTIONS" --generator "$GENERATOR" --template "$TEMPLATE" \
        --store "$RUN/answers/1.jsonl" --second_store "$RUN/answers/2.jsonl" --second_prompts $OPENQA/wording_2.yaml \
        --output_file "$RUN/gate.json" --seed "$SEED"
}

# shellcheck disable=SC2153  # a setting
PASSAGES=$DATA/passages.jsonl
[[ -f $PASSAGES ]] || PASSAGES=$DATA/passages.jsonl.gz
piece lists 0.3 "$RUN/lists/summary.json" lists
piece generator 0.5 "$GENERATOR/trained_on.sha256" generator
piece gate 0.5 "$RUN/gate.json" gate
verdict() { python -c "import json, sys; print(json.load(open(sys.argv[1]))['verdict'])" "$RUN/gate.json"; }
if [[ $(verdict) != go && -z ${FORCE:-} ]]; then
    echo "gate 0: the verdict is to stop, for the reasons above and in $RUN/gate.json. FORCE=1 continues." >&2
    exit 0
fi
