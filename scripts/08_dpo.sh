#!/usr/bin/env bash
# Rewards -> preference pairs -> DPO model, which LLaMA-Factory trains from the model that sampled. DPO_RECIPE=dpo_ftx or simpo trains
# with a variant of DPO; DPO_RECIPE=dpo_lora or dpo_qlora trains an adapter on one GPU and merges it.
source "$(dirname "$0")/common.sh"
needs "$WORK/training_data/${MODEL}_output_dpo.jsonl" scripts/07_reward.sh

# shellcheck disable=SC2086  # the *_FLAGS are lists of flags
fit_to "$DPO_RECIPE" "$POLICY" ${DPO_FLAGS:-}
# On several machines, the first one makes the pairs; the others wait for it when they train.
# shellcheck disable=SC2086
((${NODE_RANK:-0} > 0)) || python construct_dpo.py "${PROMPT_FLAGS[@]}" "${FIT_FLAGS[@]}" --input_file "$WORK/training_data/${MODEL}_output_dpo.jsonl" \
    --reranker_file "$WORK/training_data/${MODEL}_reranker_dpo.json" \
    --generator_file "$WORK/training_data/${MODEL}_generator_dpo.json" ${PAIR_FLAGS:-}
# shellcheck disable=SC2046,SC2086
train dpo "$DPO_RECIPE" "$WORK/training_data/${MODEL}_reranker_dpo.json" "$WORK/training_data/${MODEL}_generator_dpo.json" \
    $(version_of "$POLICY") -- model_name_or_path="$POLICY" ${DPO_FLAGS:-}
