#!/usr/bin/env bash
# Documents and answers -> two tables per evaluation set: how well the documents were found, and a line per model and selector.
source "$(dirname "$0")/common.sh"

for set in "${SETS[@]}"; do
    name=${set%%=*}
    results=()
    for stage in sft dpo best; do
        for selector in $SELECTORS; do
            file=$WORK/results/${name}_${stage}_${selector/:/}.json
            [[ -f $file ]] && results+=("$file")
        done
    done
    ((${#results[@]})) || refuse "no results for $name; make them with: bash scripts/09_infer.sh $CONFIG"
    python evaluate_retrieval.py --results_file "$WORK/eval_data/$name.jsonl" --group_by "$GROUP_BY" \
        --output_file "$WORK/results/${name}_retrieval.json" --table_file "$WORK/results/${name}_retrieval.md"
    python evaluate.py --results_file "${results[@]}" --eval_file "$WORK/eval_data/$name.jsonl" --group_by "$GROUP_BY" \
        --output_file "$WORK/results/$name.metrics.json" --table_file "$WORK/results/$name.md"
done
