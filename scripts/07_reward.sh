#!/usr/bin/env bash
# Trajectories -> trajectories with rewards.
source "$(dirname "$0")/common.sh"
needs "$WORK/results/training_data_dpo_sampling.json" scripts/06_sample.sh

# shellcheck disable=SC2086  # REWARD_FLAGS is a list of flags
python reward_trajectories.py "${PROMPT_FLAGS[@]}" --input_file "$WORK/results/training_data_dpo_sampling.json" \
    --output_file "$WORK/training_data/${MODEL}_output_dpo.jsonl" --bert_model "$BERT_MODEL" \
    --judge-cache "${JUDGE_CACHE:-$WORK/results/judge_cache.sqlite}" ${REWARD_FLAGS:-}
