#!/usr/bin/env bash
# Documents and answers -> two tables per evaluation set: how well the documents were found, and a line per model and selector:
# the models of scripts/09_infer.sh, and any other of scripts/infer_all.sh.
source "$(dirname "$0")/common.sh"

# others_of SET: the models besides sft, dpo and best that have answered it, one a line. A result is called SET_MODEL_SELECTOR.json;
# one of a set whose name goes on from this one's (nq, nq_hard) is not this one's.
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
    ((${#results[@]})) || refuse "no results for $name; make them with: bash scripts/09_infer.sh $CONFIG, or of another model with:" \
        "bash scripts/infer_all.sh $CONFIG MODEL"
    python evaluate_retrieval.py --results_file "$WORK/eval_data/$name.jsonl" --group_by "$GROUP_BY" \
        --output_file "$WORK/results/${name}_retrieval.json" --table_file "$WORK/results/${name}_retrieval.md"
    python evaluate.py --results_file "${results[@]}" --eval_file "$WORK/eval_data/$name.jsonl" --group_by "$GROUP_BY" \
        --output_file "$WORK/results/$name.metrics.json" --table_file "$WORK/results/$name.md"
done
