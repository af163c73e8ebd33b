#!/usr/bin/env bash
# Answer from more documents than fit in one window. One table per evaluation set compares the choice over all windows with the choice
# in the first window and with the reranker's choice among as many documents: score, documents, calls and tokens.
#     TOP_N="100 500" bash scripts/11_top_n.sh configs/llama3_8b.env      after retrieval with N_DOCS_RETRIEVED=500
source "$(dirname "$0")/common.sh"
[[ -n $TOP_N ]] || { echo "TOP_N is empty: skipping more documents than fit in one window" >&2; exit 0; }
# shellcheck disable=SC2086  # reports a wrong selector before any model is loaded
python -c "import inference; inference.parse_args()" --selector $TOP_N_SELECTORS
model=$(newest_model)
needs "$model/config.json" scripts/05_sft.sh
stage=$(basename "$model")

reranked_sets
for name in "${SET_NAMES[@]}"; do needs "$WORK/results/${name}_${stage}_dynamic.json" scripts/09_infer.sh; done
answer top_inference.py "$model" "$WORK/results/{input}_${stage}_windows{topn}.json" topn "$TOP_N" \
    --max-context-window "$N_DOCS_SHOWN" -- "${RERANKED_SETS[@]}"
for n in $TOP_N; do
    infer "$model" "$WORK/results/{input}_${stage}_{selector}_of_$n.json" "$TOP_N_SELECTORS" "$n" "${RERANKED_SETS[@]}"
done
[[ -z $SHARDS ]] || exit 0

for name in "${SET_NAMES[@]}"; do
    results=("$WORK/results/${name}_${stage}_dynamic.json")
    for n in $TOP_N; do
        results+=("$WORK/results/${name}_${stage}_windows$n.json")
        for selector in $TOP_N_SELECTORS; do
            results+=("$WORK/results/${name}_${stage}_${selector/:/}_of_$n.json")
        done
    done
    python evaluate.py --results_file "${results[@]}" --eval_file "$WORK/eval_data/$name.jsonl" --group_by "$GROUP_BY" \
        --output_file "$WORK/results/${name}_top_n.metrics.json" --table_file "$WORK/results/${name}_top_n.md"
done
