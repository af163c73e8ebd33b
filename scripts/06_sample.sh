#!/usr/bin/env bash
# Questions for DPO -> trajectories. The SFT model (or POLICY) samples selections of documents, and answers from each.
source "$(dirname "$0")/common.sh"
needs "$POLICY/config.json" scripts/05_sft.sh

# shellcheck disable=SC2086  # the *_FLAGS are lists of flags
sharded "$WORK/training_data/training_data_dpo.jsonl" "$WORK/results/training_data_dpo_sampling.json" \
    python sampling_dpo_trajectories.py "${PROMPT_FLAGS[@]}" --template "$TEMPLATE" --llm-model "$POLICY" --input-jsonl '{in}' \
    --output-json '{out}' --topn "$N_DOCS_SHOWN" ${ENGINE_FLAGS:-} ${SAMPLE_FLAGS:-}
