#!/usr/bin/env bash
# Run several rounds of sampling, rewards, preference pairs and DPO. Each round starts from the model of the round before it, and
# held-out questions compare the models.
#     bash scripts/iterate.sh ROUNDS [configs/demo.env]
# It stops after one round (or PATIENCE rounds) without a better score than the best round. DynamicRAG_$MODEL/best is the model of the
# best round, and rounds/rounds.md has one line per round. The same command continues after an interruption, or with more ROUNDS.
# The held-out questions are DEV_QUESTIONS (default: those of SPLIT_FLAGS="--dev_size N" in scripts/04_training_data.sh).
set -euo pipefail
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { echo "usage: bash scripts/iterate.sh ROUNDS [SETTINGS]" >&2; exit 2; }
ROUNDS=$1
shift
source "$(dirname "$0")/common.sh"
needs "$MODEL_DIR/sft/config.json" scripts/05_sft.sh
needs "$WORK/training_data/training_data_dpo.jsonl" scripts/04_training_data.sh
DEV_QUESTIONS=${DEV_QUESTIONS:-$WORK/training_data/training_data_dev.jsonl}
[[ -f $DEV_QUESTIONS ]] || refuse "$DEV_QUESTIONS: does not exist; set DEV_QUESTIONS to a file of rows with docs, or set" \
    "SPLIT_FLAGS=\"--dev_size N\", move $WORK/training_data away and run scripts/04_training_data.sh again"
[[ -z $SHARDS ]] || refuse "SHARDS=\"$SHARDS\": rounds run on one machine only; unset SHARDS, or run the numbered scripts"

[[ -z $OF_ROLES ]] || refuse "ROLES=\"$ROLES\": every round trains one model for both roles; unset ROLES, or run the numbered scripts"

BASE=$(realpath "$WORK")
BEST=$MODEL_DIR/best
SEED=${SEED:-42}
export JUDGE_CACHE=$BASE/results/judge_cache.sqlite

dev() { # ROUND MODEL: answer the held-out questions and score the answers
    local folder=$BASE/rounds/$1
    infer "$2" "$folder/results/dev.json" dynamic "$N_DOCS_SHOWN" "$DEV_QUESTIONS"
    python evaluate.py --results_file "$folder/results/dev.json" --eval_file "$DEV_QUESTIONS" --group_by "$GROUP_BY" \
        --output_file "$folder/results/dev.metrics.json" >/dev/null
}

policy=$(realpath "$MODEL_DIR/sft")
dev 0 "$policy"
for ((round = 1; round <= ROUNDS; round++)); do
    echo "round $round of $ROUNDS, from $policy" >&2
    folder=$BASE/rounds/$round
    mkdir -p "$folder/training_data"
    ln -sf "$BASE/training_data/training_data_dpo.jsonl" "$folder/training_data/"
    for script in 06_sample 07_reward 08_dpo; do
        WORK=$folder POLICY=$policy SAMPLE_FLAGS="$SAMPLE_FLAGS --seed $((SEED + round))" bash "scripts/$script.sh" "$CONFIG"
    done
    policy=$folder/DynamicRAG_$MODEL/dpo
    dev "$round" "$policy"
    python scripts/rounds.py --rounds_dir "$BASE/rounds" --last "$round" --model "$MODEL"
    best=$(cat "$BASE/rounds/best")
    if [[ $best == 0 ]]; then best_model=$MODEL_DIR/sft; else best_model=$BASE/rounds/$best/DynamicRAG_$MODEL/dpo; fi
    ln -sfn "$(realpath --relative-to="$MODEL_DIR" "$best_model")" "$BEST"
    ((round - best < ${PATIENCE:-1})) || { echo "round $round: not better than round $best; stopping" >&2; break; }
done
cat "$BASE/rounds/rounds.md"
echo "$BEST: the model of the best round, $best; the table of all rounds is $BASE/rounds/rounds.md" >&2
