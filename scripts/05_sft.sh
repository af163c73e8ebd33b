#!/usr/bin/env bash
# SFT sets -> SFT model (behaviour cloning): LLaMA-Factory trains one model to choose documents and to answer.
# SFT_RECIPE=sft_lora or sft_qlora trains an adapter on one GPU and merges it. ROLES=reranker or generator trains a model for one role.
source "$(dirname "$0")/common.sh"
declare -A files=([reranker]=$WORK/training_data/reranker_bc_training.json [generator]=$WORK/training_data/generator_sft_training.json)
declare -A sets=([reranker]=reranker_bc [generator]=generator_sft)
data=() only=()
for role in $ROLES; do
    needs "${files[$role]}" scripts/04_training_data.sh
    data+=("${files[$role]}")
    [[ -z $OF_ROLES ]] || only=(dataset="${sets[$role]}")
done

# shellcheck disable=SC2046,SC2086  # SFT_DATA is a list of files, SFT_FLAGS a list of key=value settings, which override the recipe
train "sft$OF_ROLES" "$SFT_RECIPE" "${data[@]}" ${SFT_DATA:-} $(version_of "$BASE_MODEL") -- model_name_or_path="$BASE_MODEL" "${only[@]}" ${SFT_FLAGS:-}
