#!/usr/bin/env bash
# Reranked questions -> SFT sets of reranker and generator, questions for DPO, and held-out questions.
source "$(dirname "$0")/common.sh"
needs "$WORK/output/retrieval_data_rerank.jsonl" scripts/03_rerank.sh

# The demo trains its base model later, from CHAT_MODEL. Both have the same tokenizer.
# shellcheck disable=SC2086  # the *_FLAGS are lists of flags
fit_to "$SFT_RECIPE" "${CHAT_MODEL:-$BASE_MODEL}" ${SFT_FLAGS:-}
# shellcheck disable=SC2086
python process_training_data.py --input_file "$WORK/output/retrieval_data_rerank.jsonl" \
    --sequence_file "$WORK/training_data/retrieval_data_rerank_sequence.jsonl" \
    --normal_file "$WORK/training_data/retrieval_data_rerank_normal.jsonl" --n_docs "$N_DOCS_SHOWN" ${EXPERT_FLAGS:-}
python reranker_sequence.py "${PROMPT_FLAGS[@]}" "${FIT_FLAGS[@]}" --input_file "$WORK/training_data/retrieval_data_rerank_sequence.jsonl" \
    --output_file "$WORK/training_data/reranker_bc_training.json"
# shellcheck disable=SC2086
python split_for_sft_dpo.py --input_file "$WORK/training_data/retrieval_data_rerank_normal.jsonl" \
    --sft_file "$WORK/training_data/training_data_sft.jsonl" \
    --dpo_file "$WORK/training_data/training_data_dpo.jsonl" \
    --dev_file "$WORK/training_data/training_data_dev.jsonl" ${SPLIT_FLAGS:-}
python construct_generator_sft.py "${PROMPT_FLAGS[@]}" "${FIT_FLAGS[@]}" --input_file "$WORK/training_data/training_data_sft.jsonl" \
    --output_file "$WORK/training_data/generator_sft_training.json"
