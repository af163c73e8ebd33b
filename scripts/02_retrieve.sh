#!/usr/bin/env bash
# Questions -> questions with documents: the training questions and every evaluation set.
source "$(dirname "$0")/common.sh"
[[ " $SEARCH_FLAGS " == *" --index bm25 "* ]] || needs "$EMBEDDINGS" scripts/01_embed.sh

retrieve() { # QUESTIONS OUTPUT
    # shellcheck disable=SC2086  # RETRIEVER_FLAGS and SEARCH_FLAGS are lists of flags
    sharded "$1" "$2" python retriever.py --model_name_or_path "$RETRIEVER" $RETRIEVER_FLAGS --passages "$PASSAGES" \
        --passages_embeddings "$EMBEDDINGS/*" --query '{in}' --output_file '{out}' --n_docs "$N_DOCS_RETRIEVED" $SEARCH_FLAGS
}
given TRAIN_QUESTIONS
retrieve "$TRAIN_QUESTIONS" "$WORK/output/retrieval_data.jsonl"
for questions in $EVAL_QUESTIONS; do
    retrieve "$questions" "$WORK/output/retrieval_$(basename "${questions%.*}").jsonl"
done
