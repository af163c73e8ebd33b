#!/usr/bin/env bash
# What retrieval and selection cost the demo: its questions with every needed passage among the documents shown, answered from
# those chosen and from those needed.
#     bash scripts/oracle.sh configs/demo.env
source "$(dirname "$0")/common.sh"

for set in "${SETS[@]}"; do
    name=${set%%=*}
    needs "$WORK/eval_data/$name.jsonl" scripts/03_rerank.sh
    oracle=$WORK/eval_data/${name}_oracle.jsonl
    [[ -f $oracle ]] || python examples/factbook/oracle.py --input_file "$WORK/eval_data/$name.jsonl" --passages "$PASSAGES" \
        --output_file "$oracle" --n_docs "$N_DOCS_SHOWN"
    for model in "$MODEL_DIR/sft" "$MODEL_DIR/dpo"; do
        answer inference.py "$model" "$WORK/results/{input}_$(basename "$model")_{selector}.json" selector "dynamic gold" \
            --topn "$N_DOCS_SHOWN" -- "$oracle"
    done
done
