#!/usr/bin/env bash
# Every evaluation set answered with every selector, by the SFT model, the DPO model and the best of several rounds.
source "$(dirname "$0")/common.sh"
needs "$MODEL_DIR/sft/config.json" scripts/05_sft.sh

for stage in sft dpo best; do
    [[ -f $MODEL_DIR/$stage/config.json ]] || { [[ $stage == best ]] || echo "no $stage model yet (scripts/08_dpo.sh); left out" >&2; continue; }
    for questions in $EVAL_QUESTIONS; do
        name=$(basename "${questions%.*}")
        needs "$WORK/eval_data/$name.jsonl" scripts/03_rerank.sh
        # shellcheck disable=SC2086  # ENGINE_FLAGS and SELECTORS are lists
        python inference.py "${PROMPT_FLAGS[@]}" --template "$TEMPLATE" --llm-model "$MODEL_DIR/$stage" \
            --input-json "$WORK/eval_data/$name.jsonl" \
            --output-json "$WORK/results/${name}_${stage}_{selector}.json" \
            --remain-output-json "$WORK/results/${name}_${stage}_{selector}_remain.json" \
            --topn "$N_DOCS_SHOWN" $ENGINE_FLAGS --selector $SELECTORS
    done
done
