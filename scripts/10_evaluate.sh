#!/usr/bin/env bash
# Documents and answers -> two tables per evaluation set. One scores the retrieved documents; the other has one line per model and
# selector, for the models of scripts/09_infer.sh and of scripts/infer_all.sh.
source "$(dirname "$0")/common.sh"

# others_of SET: print the models other than sft, dpo and best that have answered SET, one per line. The name of a results file is
# SET_MODEL_SELECTOR.json. A file of nq_hard also begins with nq_, but is not a result of the set nq.
others_of() {
    local selector end file model other
    for selector in $SELECTORS; do
        end=_${selector/:/}.json
        for file in "$WORK/results/$1"_*"$end"; do
            model=$(basename "$file" "$end")
            for other in "$WORK/eval_data/$1"_*.jsonl; do
                [[ $model != "$(basename "$other" .jsonl)"_* ]] || continue 2
            done
            model=${model#"$1"_}
            [[ ! -f $file || $model == @(sft|dpo|best) ]] || echo "$model"
        done
    done | sort -u
}

for name in "${SET_NAMES[@]}"; do
    results=()
    mapfile -t others < <(others_of "$name")
    for model in sft dpo best "${others[@]}"; do
        for selector in $SELECTORS; do
            file=$WORK/results/${name}_${model}_${selector/:/}.json
            [[ -f $file ]] && results+=("$file")
        done
    done
    ((${#results[@]})) || refuse "$WORK/results: no results of the set $name; make them with: bash scripts/09_infer.sh $CONFIG, or for another model:" \
        "bash scripts/infer_all.sh $CONFIG MODEL"
    python evaluate_retrieval.py --results_file "$WORK/eval_data/$name.jsonl" --group_by "$GROUP_BY" \
        --output_file "$WORK/results/${name}_retrieval.json" --table_file "$WORK/results/${name}_retrieval.md"
    python evaluate.py --results_file "${results[@]}" --eval_file "$WORK/eval_data/$name.jsonl" --group_by "$GROUP_BY" \
        --output_file "$WORK/results/$name.metrics.json" --table_file "$WORK/results/$name.md"
done
