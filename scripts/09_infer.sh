#!/usr/bin/env bash
# Every evaluation set answered with every selector, by the SFT model, the DPO model and the best of several rounds, or by those
# of STAGES="sft dpo".
source "$(dirname "$0")/common.sh"
needs "$MODEL_DIR/sft/config.json" scripts/05_sft.sh

for stage in ${STAGES:-}; do
    [[ $stage == @(sft|dpo|best) || -f $MODEL_DIR/$stage/config.json ]] || \
        refuse "STAGES=\"$STAGES\": there is no model $MODEL_DIR/$stage; expected sft, dpo, best or another folder of $MODEL_DIR"
done
for stage in ${STAGES:-sft dpo best}; do
    [[ -f $MODEL_DIR/$stage/config.json ]] || { [[ $stage == best ]] || echo "no $stage model yet (scripts/08_dpo.sh); left out" >&2; continue; }
    # the best round may be the last, or none
    [[ $stage == best && $(realpath "$MODEL_DIR/best") == @($(realpath "$MODEL_DIR/sft")|$(realpath -m "$MODEL_DIR/dpo")) ]] && continue
    bash scripts/infer_all.sh "$CONFIG" "$MODEL_DIR/$stage"
done
