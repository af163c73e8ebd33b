#!/usr/bin/env bash
# Rewards -> training rows -> model, which LLaMA-Factory trains from the model that sampled. DPO_RECIPE chooses rows and trainer:
#   dpo, dpo_ftx, simpo, dpo_lora, dpo_qlora    preference pairs (construct_dpo.py, PAIR_FLAGS): DPO and its variants
#   best_of_n, best_of_n_lora                   the best trajectory of a question (construct_best_of_n.py, BEST_OF_N_FLAGS): SFT
#   kto, kto_lora                               single outputs, desirable or not (construct_kto.py, KTO_FLAGS): KTO
# Recipes with lora or qlora train an adapter on one GPU and merge it. ROLES=reranker or generator trains a model for one role.
source "$(dirname "$0")/common.sh"
needs "$WORK/training_data/${MODEL}_output_dpo.jsonl" scripts/07_reward.sh
case $DPO_RECIPE in
    best_of_n*) kind=best_of_n row_flags="${BEST_OF_N_FLAGS:-} --roles $ROLES" ;;
    kto*) kind=kto row_flags="${KTO_FLAGS:-} --roles $ROLES" ;;
    *) kind=dpo row_flags=${PAIR_FLAGS:-} ;;
esac
data=() only=()
for role in $ROLES; do
    data+=("$WORK/training_data/${MODEL}_${role}_$kind.json")
    [[ -z $OF_ROLES ]] || only=(dataset="${MODEL}_${role}_$kind")
done

# shellcheck disable=SC2086  # the *_FLAGS are lists of flags
fit_to "$DPO_RECIPE" "$POLICY" ${DPO_FLAGS:-}
# On several machines, the first one makes the rows; the others wait for it when they train.
# shellcheck disable=SC2086
((${NODE_RANK:-0} > 0)) || python "construct_$kind.py" "${PROMPT_FLAGS[@]}" "${FIT_FLAGS[@]}" --input_file "$WORK/training_data/${MODEL}_output_dpo.jsonl" \
    --reranker_file "$WORK/training_data/${MODEL}_reranker_$kind.json" \
    --generator_file "$WORK/training_data/${MODEL}_generator_$kind.json" $row_flags
# shellcheck disable=SC2046,SC2086
train "dpo$OF_ROLES" "$DPO_RECIPE" "${data[@]}" $(version_of "$POLICY") -- model_name_or_path="$POLICY" "${only[@]}" ${DPO_FLAGS:-}
