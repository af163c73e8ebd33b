#!/usr/bin/env bash
# Print what every numbered script would start on this machine, or with LAUNCHER=ray on the cluster of RAY_ADDRESS, computed with the
# functions of these scripts. It starts nothing.
#     bash scripts/plan.sh [configs/llama3_8b.env]
source "$(dirname "$0")/common.sh"

row() { printf '| %-19s |' "$1"; printf ' %-12s |' "${@:2}"; echo; }
on() { if (($#)); then (IFS=,; echo "$*"); else echo CPU; fi; }

work() { # SCRIPT PARTS SIZE: a worker of an undivided file sees all GPUs
    local gpus
    gpus=$(if [[ $LAUNCHER == ray ]]; then echo "of any node"; elif (($2 == 1)); then on "${GPUS[@]}"; else gpus_of 0; fi)
    row "$1" $(($2 < WORKERS ? $2 : WORKERS)) "${gpus:-CPU}" "$2" "$3"
}
answers() { # SCRIPT: a row for the first evaluation set
    work "$1" "$(parts_of "" "$WORK/results/parts/split/${SET_NAMES[0]}")" "$size"
}
size=$(engine_size)
size=${size:-1}
if [[ -z $WORKERS ]]; then
    WORKERS=$(launch --workers)
    NUM_SHARDS=${NUM_SHARDS:-$((WORKERS * ${PARTS_PER_GPU:-1}))}
    echo "Ray cluster $RAY_ADDRESS: $WORKERS workers with $GPUS_PER_SHARD GPUs each"
fi
echo "GPUs: $(on "${GPUS[@]}"); NUM_SHARDS=$NUM_SHARDS, GPUS_PER_SHARD=$GPUS_PER_SHARD${SHARDS:+, SHARDS=\"$SHARDS\"}"
echo
row script workers "GPUs of the first" parts "tensor parallel size"
row --- --- --- --- ---
output=$WORK/output/retrieval_data
row 00_prepare.sh 1 CPU 1 -
work 01_embed.sh "$(embedding_shards)" -
work 02_retrieve.sh "$(parts_of "$output.jsonl" "$output.jsonl.parts/in")" -
work 03_rerank.sh "$(parts_of "${output}_rerank.jsonl" "${output}_rerank.jsonl.parts/in")" -
row 04_training_data.sh 1 CPU 1 -
sampled=$WORK/results/training_data_dpo_sampling.json
work 06_sample.sh "$(parts_of "$sampled" "$sampled.parts/in")" "$size"
row 07_reward.sh 1 "$(on "${GPUS[@]:0:1}")" 1 -
answers 09_infer.sh
row 10_evaluate.sh 1 CPU 1 -
answers 11_top_n.sh
echo

row script recipe GPUs processes "per device" accumulation "total batch" DeepSpeed torchrun
row --- --- --- --- --- --- --- --- ---
training() { # SCRIPT RECIPE KEY=VALUE...
    local recipe=recipes/$MODEL/$2.yaml said
    if said=$( (layout "$recipe" "${@:3}") 2>&1); then
        layout "$recipe" "${@:3}"  # again in this shell, to set its variables
        row "$1" "$2" "$(on "${TRAIN_ON[@]}")" "$PROCESSES" "$PER_DEVICE" "$ACCUMULATION" "$TOTAL_BATCH" \
            "$([[ -n $DEEPSPEED ]] && echo yes || echo no)" "$TORCHRUN"
    else
        row "$1" "$2" "${said#error: }"
    fi
}
# shellcheck disable=SC2086  # lists of key=value settings
training 05_sft.sh "$SFT_RECIPE" ${SFT_FLAGS:-}
# shellcheck disable=SC2086
training 08_dpo.sh "$DPO_RECIPE" ${DPO_FLAGS:-}
