#!/usr/bin/env bash
# Which training makes a model choose documents by the answers of a frozen generator? Real questions that need 0 to 4 documents
# (docs/openqa.md).
#     bash experiments/openqa.sh                              all pieces
#     UNTIL=gate bash experiments/openqa.sh                   up to the piece of this name
#     DATA=folder MODEL=folder RUN=folder bash experiments/openqa.sh
# Every piece takes under an hour on two cores and writes one file. A piece whose file exists is not repeated, and an interrupted piece
# continues with the same command. RUN/hours.tsv has the hours of each piece.
# shellcheck disable=SC2153  # settings.env assigns the names in capitals
set -euo pipefail
cd "$(dirname "$0")/.."
[[ -x .venv/bin/python ]] || bash scripts/setup.sh
source scripts/common.sh experiments/openqa/settings.env
GENERATOR=$RUN/generator/model/sft
mkdir -p "$RUN"

# openqa SCRIPT FLAG...: run a script of experiments/openqa. Some import stages, which are in this folder.
openqa() {
    local script=$1
    shift
    PYTHONPATH=$PWD python "experiments/openqa/$script" "$@"
}

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
    [[ -f $RUN/questions/reranker_searched.jsonl ]] || openqa splits.py --data "$DATA" --output_dir "$RUN/questions" --seed "$SEED" $SPLIT_FLAGS
    for group in reranker asked; do
        python retriever.py --query "$RUN/questions/${group}_searched.jsonl" --passages "$PASSAGES" --passage_store "$RUN/passages.store" \
            --index bm25 --n_docs 20 --output_file "$RUN/questions/${group}_found.jsonl"
        cat "$RUN/questions/${group}_own.jsonl" "$RUN/questions/${group}_found.jsonl" >"$RUN/questions/$group.jsonl"
    done
    python examples/factbook/train_cross_encoder.py --input_file "$RUN/questions/reranker.jsonl" --encoder "$ENCODER" --output_dir "$RUN/cross-encoder" \
        --max_pairs "$RERANKER_PAIRS" --seed "$SEED" --threads "$(nproc)"
    python reranker.py --model_name_or_path "$RUN/cross-encoder" --input_file "$RUN/questions/asked.jsonl" --output_file "$RUN/reranked.jsonl" \
        --n_docs 20 --max_length 256 --sort
    openqa lists.py --input_file "$RUN/reranked.jsonl" --output_dir "$RUN/lists" --n_docs "$N_DOCS"
}

generator() {
    local folder=$RUN/generator number prompts
    openqa contexts.py --input_file "$RUN/reranked.jsonl" --output_dir "$folder" --n_docs "$N_DOCS" --seed "$SEED"
    fit_to sft "$BASE"
    mkdir -p "$folder/training_data"
    for number in 1 2; do
        prompts=()
        ((number == 1)) || prompts=(--prompts experiments/openqa/wording_2.yaml)
        python construct_generator_sft.py "${FIT_FLAGS[@]}" "${prompts[@]}" --input_file "$folder/contexts_$number.jsonl" \
            --output_file "$folder/sft_$number.jsonl"
    done
    cat "$folder/sft_1.jsonl" "$folder/sft_2.jsonl" >"$folder/training_data/generator_sft_training.json"
    train_in "$folder" sft generator_sft "$folder/training_data/generator_sft_training.json" model_name_or_path="$BASE" seed="$SEED"
}

gate() {
    openqa gate.py --input_file "$RUN/lists/dev.jsonl" --questions "$GATE_QUESTIONS" --generator "$GENERATOR" --template "$TEMPLATE" \
        --store "$RUN/answers/1.jsonl" --second_store "$RUN/answers/2.jsonl" --second_prompts experiments/openqa/wording_2.yaml \
        --output_file "$RUN/gate.json" --seed "$SEED"
}


answers() { # FLAGS of answer.py: the frozen generator's answers
    openqa answer.py --store "$RUN/answers/1.jsonl" --generator "$GENERATOR" --template "$TEMPLATE" "$@"
}

# chosen MODEL SPLIT FOLDER NAME: the selections of MODEL for a split and their answers, FOLDER/results/SPLIT_NAME.json.
chosen() {
    openqa choose.py --llm-model "$1" --template "$TEMPLATE" --max-model-len 2048 --input_file "$RUN/lists/$2.jsonl" \
        --output_file "$3/choices/$2_$4.jsonl"
    answers --input_file "$3/choices/$2_$4.jsonl" --output_file "$3/results/$2_$4.json"
}

baselines() {
    local split fixed=()
    mapfile -t fixed < <(seq -f "top:%g" 1 "$N_DOCS")
    mkdir -p "$RUN/question_k"
    python process_training_data.py --input_file "$RUN/lists/cloning.jsonl" --sequence_file "$RUN/question_k/sequence.jsonl" \
        --normal_file "$RUN/question_k/normal.jsonl" --n_docs "$N_DOCS" --max_rows 1
    for split in dev test; do
        answers --input_file "$RUN/lists/$split.jsonl" --selectors none "${fixed[@]}" monot5 adaptive gold \
            --output_file "$RUN/results/${split}_{selector}.json"
        python experiments/question_k.py --train_files "$RUN"/question_k/{sequence,normal}.jsonl --encoder "$ENCODER" --n_docs "$N_DOCS" \
            --input_file "$RUN/lists/$split.jsonl" --output_file "$RUN/question_k/$split.jsonl"
        answers --input_file "$RUN/question_k/$split.jsonl" --selectors monot5 --output_file "$RUN/question_k/${split}_{selector}.json"
        mv "$RUN/question_k/${split}_monot5.json" "$RUN/results/${split}_question_k.json"
    done
}

zero_shot() { chosen "$BASE" dev "$RUN" zero_shot; chosen "$BASE" test "$RUN" zero_shot; }

# clone FOLDER PART LABELS BASE: train FOLDER/model/sft from BASE to write the selections that the LABELS (reranker or gold) give for PART.
clone() {
    local folder=$1 rows=$1/training_data
    mkdir -p "$rows"
    fit_to sft "$BASE"
    python process_training_data.py --input_file "$RUN/lists/$2.jsonl" --labels "$3" --sequence_file "$rows/sequence.jsonl" \
        --normal_file "$rows/normal.jsonl" --n_docs "$N_DOCS" --max_rows 1000000 --max_per_length 1000000
    python reranker_sequence.py "${FIT_FLAGS[@]}" --input_file "$rows/sequence.jsonl" --output_file "$rows/reranker_bc_training.json"
    train_in "$folder" sft reranker_bc "$rows/reranker_bc_training.json" model_name_or_path="$4" seed="$SEED"
}

samples() { # FOLDER: sampled selections of the cloned model, and the answers from them
    # shellcheck disable=SC2086  # SAMPLE_FLAGS is a list of flags
    openqa choose.py --llm-model "$1/bc/model/sft" --template "$TEMPLATE" --max-model-len 2048 --input_file "$RUN/lists/rl.jsonl" \
        --output_file "$1/sampled.jsonl" --num_samples "$SAMPLES" --seed "$SEED" ${SAMPLE_FLAGS:-}
    answers --input_file "$1/sampled.jsonl" --output_file "$1/answered.jsonl"
    reward f1 "$1"
}

reward() { # KIND FOLDER: the rewards of the sampled selections, FOLDER/KIND.jsonl
    local weights=em=.48,score=.48,length=.04 more=()
    [[ $1 != likelihood ]] || weights=likelihood=.96,length=.04 more=(--llm-model "$GENERATOR" --template "$TEMPLATE")
    python reward_trajectories.py --input_file "$2/answered.jsonl" --output_file "$2/$1.jsonl" --metric f1 --weights "$weights" "${more[@]}"
}

# arm NAME FOLDER: train the arm NAME from the cloned model of the seed's FOLDER. bc_plus and gold clone the questions of RL, with the labels
# of the reranker or the needed documents; the other arms train on sampled selections and their rewards.
arm() {
    local name=$1 folder=$2/$1 bc=$2/bc/model/sft recipe rewards=f1 rows flags=() more=()
    recipe=$(recipe_of "$1")
    rows=$folder/training_data/${MODEL}_reranker_$recipe.json
    mkdir -p "$folder/training_data"
    [[ $name == grpo ]] || fit_to "$recipe" "$BASE"
    case $name in
        bc_plus) clone "$folder" rl reranker "$bc"; return ;;
        gold) clone "$folder" rl gold "$bc"; return ;;
        dpo|dpo_likelihood|dpo_at_*) flags=(--pair-by set --min-margin "$MIN_MARGIN" --max-reranker-pairs "$PAIRS" --generator_file "$folder/training_data/unused.json") ;;
        best_of_n|kto) flags=(--roles reranker) ;;
        grpo) grpo "$folder" "$bc"; return ;;
        *) refuse "ARMS: $name is no arm; see docs/openqa.md" ;;
    esac
    if [[ $name == dpo_likelihood ]]; then
        rewards=likelihood
        reward likelihood "$2"
    fi
    python "construct_$recipe.py" "${FIT_FLAGS[@]}" --input_file "$2/$rewards.jsonl" --reranker_file "$rows" --seed "$SEED" "${flags[@]}"
    [[ $name != dpo_at_* ]] || more=(learning_rate="${name#dpo_at_}")
    [[ $name != kto ]] || more=(max_samples=$((2 * PAIRS)))  # as many sequences as the pairs have
    train_in "$folder" "$recipe" "${MODEL}_reranker_$recipe" "$rows" model_name_or_path="$bc" seed="$SEED" "${more[@]}"
}
grpo() { # FOLDER MODEL: GRPO from MODEL, on as many sequences as the other arms. The same questions of dev choose the step that is kept.
    head -n "$GRPO_DEV" "$RUN/lists/dev.jsonl" >"$1/dev.jsonl"
    # shellcheck disable=SC2086  # GRPO_FLAGS is a list of flags
    python grpo_selector.py --llm-model "$GENERATOR" --reranker-model "$2" --template "$TEMPLATE" --max-model-len 2048 --topn "$N_DOCS" \
        --input_file "$RUN/lists/rl.jsonl" --dev_file "$1/dev.jsonl" --output_dir "$1/model/grpo" --metric f1 --document-cost 0.02 \
        --answer-order retrieval --seed "$SEED" $GRPO_FLAGS
}
recipe_of() { # ARM
    case $1 in bc|bc_plus|gold) echo sft ;; dpo*) echo dpo ;; *) echo "$1" ;; esac
}
model_of() { echo "$1/model/$(recipe_of "$1")"; } # ARM: its model within the folder of the seed
finished_by() { # ARM: the file that its training writes last
    case $1 in grpo) echo "$(model_of grpo)/grpo.jsonl.manifest.json" ;; *) echo "$(model_of "$1")/trained_on.sha256" ;; esac
}
asked() { # ARM FOLDER: answer dev and test with the model of an arm
    chosen "$2/$(model_of "$1")" dev "$2" "$1"
    chosen "$2/$(model_of "$1")" test "$2" "$1"
}

seed() { # SEED ARM...: all pieces of one seed
    local SEED=$1 folder=$RUN/seed_$1 name
    shift
    mkdir -p "$folder"
    piece "bc_$SEED" 0.8 "$folder/$(finished_by bc)" clone "$folder/bc" cloning reranker "$BASE"
    piece "test_bc_$SEED" 0.4 "$folder/results/test_bc.json" asked bc "$folder"
    piece "samples_$SEED" 0.4 "$folder/f1.jsonl.manifest.json" samples "$folder"
    for name in "$@"; do
        piece "${name}_$SEED" 0.7 "$folder/$(finished_by "$name")" arm "$name" "$folder"
        piece "test_${name}_$SEED" 0.4 "$folder/results/test_$name.json" asked "$name" "$folder"
    done
}

tables() { openqa tables.py --run "$RUN" --output_file "$RUN/openqa.json" --table_file "$RUN/openqa.md"; }

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

piece baselines 0.7 "$RUN/results/test_question_k.json" baselines
piece zero_shot 0.4 "$RUN/results/test_zero_shot.json" zero_shot
for number in $SEEDS; do
    # shellcheck disable=SC2086  # lists of arms
    if [[ $number == "${SEEDS%% *}" ]]; then seed "$number" $ARMS $MORE_ARMS; else seed "$number" $ARMS; fi
done
rm -f "$RUN/openqa.md"  # made again with every seed and arm that there is
piece tables 0.02 "$RUN/openqa.md" tables
cat "$RUN/openqa.md"
