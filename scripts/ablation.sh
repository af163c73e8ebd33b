#!/usr/bin/env bash
# What the further data sets of the demo's behaviour cloning are worth: the SFT of one seed of the evidence again without each of
# them, from the same warm-up, and asked the same questions. Some 15 minutes each on two cores.
#     bash scripts/ablation.sh            after scripts/evidence.sh; SEED=2 takes the second seed
export SEED=${SEED:-1} DEMO_SIZE=${DEMO_SIZE:-evidence} EVIDENCE=${EVIDENCE:-runs/evidence}
export WORK=$EVIDENCE/seed_$SEED
source "$(dirname "$0")/common.sh" configs/demo.env
needs "$WORK/eval_data/test_oracle.jsonl" scripts/evidence.sh

results=("$WORK"/results/test_{sft_top3,sft_dynamic,oracle_sft_dynamic,oracle_sft_gold}.json)
for left_out in rehearsal answers; do
    folder=$EVIDENCE/without_$left_out kept=answers
    [[ $left_out == rehearsal ]] || kept=rehearsal
    mkdir -p "$folder"
    for shared in training_data eval_data; do ln -sfn "../seed_$SEED/$shared" "$folder/$shared"; done
    env WORK="$folder" BASE_MODEL="$MODEL_DIR/warm_up" SFT_DATA="$WORK/training_data/factbook_$kept.json" \
        SFT_FLAGS="${SFT_FLAGS/factbook_rehearsal,factbook_answers/factbook_$kept}" bash scripts/05_sft.sh "$CONFIG"
    for asked in "test:top:3 dynamic" "test_oracle:dynamic gold"; do
        WORK=$folder EVAL_QUESTIONS=${asked%%:*}.jsonl SELECTORS=${asked#*:} bash scripts/infer_all.sh "$CONFIG"
    done
    results+=("$folder"/results/test_{sft_top3,sft_dynamic,oracle_sft_dynamic,oracle_sft_gold}.json)
done
python evaluate.py --results_file "${results[@]}" --eval_file "$WORK/eval_data/test.jsonl" --group_by kind \
    --output_file "$EVIDENCE/ablation.json" --table_file "$EVIDENCE/ablation.md"
