#!/usr/bin/env bash
# Documents -> documents with the reranker's scores and labels, for the training questions and all evaluation sets (also EVAL_FILES).
source "$(dirname "$0")/common.sh"
needs "$WORK/output/retrieval_data.jsonl" scripts/02_retrieve.sh

rerank "$WORK/output/retrieval_data.jsonl" "$WORK/output/retrieval_data_rerank.jsonl"
for questions in ${EVAL_QUESTIONS:-}; do
    name=$(stem "$questions")
    rerank "$WORK/output/retrieval_$name.jsonl" "$WORK/eval_data/$name.jsonl"
done
for file in ${EVAL_FILES:-}; do rerank "$file" "$WORK/eval_data/$(stem "$file").jsonl"; done
