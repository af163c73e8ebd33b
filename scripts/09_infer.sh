#!/usr/bin/env bash
# Evaluation sets -> answers: every set with every selector, from the SFT model, the DPO model and the best model of several rounds.
# STAGES="sft dpo" restricts the models.
source "$(dirname "$0")/common.sh"
needs "$MODEL_DIR/sft/config.json" scripts/05_sft.sh

for stage in ${STAGES:-}; do
    [[ $stage == @(sft|dpo|best) || -f $MODEL_DIR/$stage/config.json ]] || \
        refuse "STAGES=\"$STAGES\": the model $MODEL_DIR/$stage does not exist; give sft, dpo, best or another folder of $MODEL_DIR"
done
for stage in ${STAGES:-sft dpo best}; do
    [[ -f $MODEL_DIR/$stage/config.json ]] || { [[ $stage == best ]] || echo "$MODEL_DIR/$stage: does not exist; left out (scripts/08_dpo.sh makes the DPO model)" >&2; continue; }
    # best may be a link to sft or dpo, which the loop answers anyway
    [[ $stage == best && $(realpath "$MODEL_DIR/best") == @($(realpath "$MODEL_DIR/sft")|$(realpath -m "$MODEL_DIR/dpo")) ]] && continue
    bash scripts/infer_all.sh "$CONFIG" "$MODEL_DIR/$stage"
done
