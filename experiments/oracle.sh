#!/usr/bin/env bash
# Measure what retrieval and selection cost the demo. Its questions, with every needed passage among the documents shown, are answered
# from the chosen documents and from the gold documents.
#     bash experiments/oracle.sh configs/demo.env
source "$(dirname "$0")/../scripts/common.sh"

reranked_sets
for file in "${RERANKED_SETS[@]}"; do
    oracle=${file%.jsonl}_oracle.jsonl
    [[ -f $oracle ]] || python examples/factbook/oracle.py --input_file "$file" --passages "$PASSAGES" \
        --output_file "$oracle" --n_docs "$N_DOCS_SHOWN"
    for model in "$MODEL_DIR/sft" "$MODEL_DIR/dpo"; do
        infer "$model" "$WORK/results/{input}_$(basename "$model")_{selector}.json" "dynamic gold" "$N_DOCS_SHOWN" "$oracle"
    done
done
