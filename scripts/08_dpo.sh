#!/usr/bin/env bash
# Rewards -> preference pairs -> LLaMA-Factory DPO from the SFT model.
source "$(dirname "$0")/common.sh"
needs "$WORK/training_data/${MODEL}_output_dpo.jsonl" scripts/07_reward.sh

# shellcheck disable=SC2086  # the *_FLAGS are lists of flags
python construct_dpo.py "${PROMPT_FLAGS[@]}" --input_file "$WORK/training_data/${MODEL}_output_dpo.jsonl" \
    --reranker_file "$WORK/training_data/${MODEL}_reranker_dpo.json" \
    --generator_file "$WORK/training_data/${MODEL}_generator_dpo.json" $PAIR_FLAGS
# shellcheck disable=SC2086
train dpo model_name_or_path="$MODEL_DIR/sft" $DPO_FLAGS
