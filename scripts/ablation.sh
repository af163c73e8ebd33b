#!/usr/bin/env bash
# What the further data sets of the demo's behaviour cloning are worth: the SFT of one seed of the evidence again without each of
# them, from the same warm-up, and asked the same questions. Some 15 minutes each on two cores.
#     bash scripts/ablation.sh            after scripts/evidence.sh; SEED=2 takes the second seed
export SEED=${SEED:-1} DEMO_SIZE=${DEMO_SIZE:-evidence} EVIDENCE=${EVIDENCE:-runs/evidence}
export WORK=$EVIDENCE/seed_$SEED
source "$(dirname "$0")/common.sh" configs/demo.env
needs "$WORK/eval_data/test_oracle.jsonl" scripts/evidence.sh

answer() { # SET SELECTOR...
    # shellcheck disable=SC2086  # ENGINE_FLAGS is a list
    python inference.py "${PROMPT_FLAGS[@]}" --template "$TEMPLATE" --llm-model "$folder/DynamicRAG_$MODEL/sft" \
        --input-json "$WORK/eval_data/$1.jsonl" --output-json "$folder/results/{input}_${name}_{selector}.json" \
        --topn "$N_DOCS_SHOWN" $ENGINE_FLAGS --selector "${@:2}"
}
results=("$WORK"/results/test_{sft_top3,sft_dynamic,oracle_sft_dynamic,oracle_sft_gold}.json)
for left_out in rehearsal answers; do
    name=without_$left_out kept=answers
    [[ $left_out == rehearsal ]] || kept=rehearsal
    folder=$EVIDENCE/$name
    mkdir -p "$folder"
    ln -sfn "../seed_$SEED/training_data" "$folder/training_data"
    env WORK="$folder" BASE_MODEL="$MODEL_DIR/warm_up" SFT_DATA="$WORK/training_data/factbook_$kept.json" \
        SFT_FLAGS="${SFT_FLAGS/factbook_rehearsal,factbook_answers/factbook_$kept}" bash scripts/05_sft.sh "$CONFIG"
    answer test top:3 dynamic
    answer test_oracle dynamic gold
    results+=("$folder"/results/test_{"$name"_top3,"$name"_dynamic,oracle_"$name"_dynamic,oracle_"$name"_gold}.json)
done
python evaluate.py --results_file "${results[@]}" --eval_file "$WORK/eval_data/test.jsonl" --group_by kind \
    --output_file "$EVIDENCE/ablation.json" --table_file "$EVIDENCE/ablation.md"
