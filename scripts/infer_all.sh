#!/usr/bin/env bash
# One model over every evaluation set, with every selector; the model is loaded once (on several GPUs: once on each, and the
# questions of every set are divided among them):
#     bash scripts/infer_all.sh configs/llama3_8b.env [MODEL]
# MODEL is a checkpoint folder; without it the newest stage of the settings' model. Results are named by the set, MODEL's last
# part and the selector; scripts/10_evaluate.sh tabulates them too.
source "$(dirname "$0")/common.sh"
model=${2:-$(newest_model)}
needs "$model/config.json" scripts/05_sft.sh

reranked_sets
infer "$model" "$WORK/results/{input}_$(basename "$model")_{selector}.json" "$SELECTORS" "$N_DOCS_SHOWN" "${RERANKED_SETS[@]}"
