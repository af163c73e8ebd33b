#!/usr/bin/env bash
# Answer every evaluation set with one model and every selector. The model is loaded once. With several GPUs it is loaded once per GPU,
# and the questions of every set are divided among them.
#     bash scripts/infer_all.sh configs/llama3_8b.env [MODEL]
# MODEL is a checkpoint folder (default: the DPO model of the settings if it exists, otherwise the SFT model). The name of a results
# file is SET_MODEL_SELECTOR.json, with the name of the folder as MODEL; scripts/10_evaluate.sh includes these files in its tables.
source "$(dirname "$0")/common.sh"
model=${2:-$(newest_model)}
needs "$model/config.json" scripts/05_sft.sh

reranked_sets
infer "$model" "$WORK/results/{input}_$(basename "$model")_{selector}.json" "$SELECTORS" "$N_DOCS_SHOWN" "${RERANKED_SETS[@]}"
