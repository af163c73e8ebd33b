#!/usr/bin/env bash
# More documents than one window holds: chosen window by window, beside one window of the first, and beside the reranker's
# choice among as many, in one table an evaluation set: score, documents, calls and tokens.
#     TOP_N="100 500" bash scripts/11_top_n.sh configs/llama3_8b.env      after retrieving as many (N_DOCS_RETRIEVED=500)
source "$(dirname "$0")/common.sh"
[[ -n $TOP_N ]] || { echo "TOP_N is empty: nothing beyond a window is asked for" >&2; exit 0; }
model=$(newest_model)
needs "$model/config.json" scripts/05_sft.sh
stage=$(basename "$model")

for questions in $EVAL_QUESTIONS; do
    name=$(basename "${questions%.*}")
    input=$WORK/eval_data/$name.jsonl
    needs "$input" scripts/03_rerank.sh
    asked=("${PROMPT_FLAGS[@]}" --template "$TEMPLATE" --llm-model "$model" --input-json "$input")
    results=("$WORK/results/${name}_${stage}_dynamic.json")
    needs "${results[0]}" scripts/09_infer.sh
    # shellcheck disable=SC2086  # ENGINE_FLAGS, TOP_N and TOP_N_SELECTORS are lists
    python top_inference.py "${asked[@]}" --output-json "$WORK/results/${name}_${stage}_windows{topn}.json" \
        --max-context-window "$N_DOCS_SHOWN" --topn $TOP_N $ENGINE_FLAGS
    for n in $TOP_N; do
        # shellcheck disable=SC2086
        python inference.py "${asked[@]}" --output-json "$WORK/results/${name}_${stage}_{selector}_of_$n.json" \
            --topn "$n" $ENGINE_FLAGS --selector $TOP_N_SELECTORS
        results+=("$WORK/results/${name}_${stage}_windows$n.json")
        for selector in $TOP_N_SELECTORS; do
            results+=("$WORK/results/${name}_${stage}_${selector/:/}_of_$n.json")
        done
    done
    python evaluate.py --results_file "${results[@]}" --eval_file "$input" --group_by "$GROUP_BY" \
        --output_file "$WORK/results/${name}_top_n.metrics.json" --table_file "$WORK/results/${name}_top_n.md"
done
