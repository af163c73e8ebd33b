#!/usr/bin/env bash
# Behaviour cloning: LLaMA-Factory trains one model to choose documents and to answer.
source "$(dirname "$0")/common.sh"
needs "$WORK/training_data/reranker_bc_training.json" scripts/04_training_data.sh
needs "$WORK/training_data/generator_sft_training.json" scripts/04_training_data.sh

# shellcheck disable=SC2086  # SFT_FLAGS is a list of key=value settings over the recipe's
train sft sft model_name_or_path="$BASE_MODEL" $SFT_FLAGS
