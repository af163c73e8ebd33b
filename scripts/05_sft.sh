#!/usr/bin/env bash
# SFT sets -> SFT model (behaviour cloning): LLaMA-Factory trains one model to choose documents and to answer.
# SFT_RECIPE=sft_lora or sft_qlora trains an adapter on one GPU and merges it.
source "$(dirname "$0")/common.sh"
data=("$WORK/training_data/reranker_bc_training.json" "$WORK/training_data/generator_sft_training.json")
for file in "${data[@]}"; do needs "$file" scripts/04_training_data.sh; done

# shellcheck disable=SC2046,SC2086  # SFT_DATA is a list of files, SFT_FLAGS a list of key=value settings, which override the recipe
train sft "$SFT_RECIPE" "${data[@]}" ${SFT_DATA:-} $(version_of "$BASE_MODEL") -- model_name_or_path="$BASE_MODEL" ${SFT_FLAGS:-}
