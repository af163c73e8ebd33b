#!/usr/bin/env bash
# One model over every evaluation set, with every selector; the model is loaded once (on several GPUs: once on each, and the
# sets are divided among them):
#     bash scripts/infer_all.sh configs/llama3_8b.env [MODEL]
# MODEL is a checkpoint folder; without it the newest stage of the settings' model. Results are named by the set, MODEL's last
# part and the selector.
source "$(dirname "$0")/common.sh"
model=${2:-$(newest_model)}
needs "$model/config.json" scripts/05_sft.sh

sets=()
for questions in $EVAL_QUESTIONS; do
    name=$(basename "${questions%.*}")
    needs "$WORK/eval_data/$name.jsonl" scripts/03_rerank.sh
    sets+=("$WORK/eval_data/$name.jsonl")
done
infer() { # SETS...
    # shellcheck disable=SC2086  # ENGINE_FLAGS and SELECTORS are lists
    python inference.py "${PROMPT_FLAGS[@]}" --template "$TEMPLATE" --llm-model "$model" --input-json "$@" \
        --output-json "$WORK/results/{input}_$(basename "$model")_{selector}.json" \
        --topn "$N_DOCS_SHOWN" $ENGINE_FLAGS --selector $SELECTORS
}
divided infer "${sets[@]}"
