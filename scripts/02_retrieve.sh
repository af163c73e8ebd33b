#!/usr/bin/env bash
# Questions -> questions with documents: the training questions and every evaluation set.
source "$(dirname "$0")/common.sh"
given_inputs
# shellcheck disable=SC2086  # reports a wrong flag before missing embeddings, which it may not need
python -c "import retriever; retriever.parse_args()" ${SEARCH_FLAGS:-}
[[ " ${SEARCH_FLAGS:-} " == *" --index bm25 "* ]] || needs "$EMBEDDINGS" scripts/01_embed.sh

retrieve "$TRAIN_QUESTIONS" "$WORK/output/retrieval_data.jsonl"
for questions in ${EVAL_QUESTIONS:-}; do
    retrieve "$questions" "$WORK/output/retrieval_$(stem "$questions").jsonl"
done
