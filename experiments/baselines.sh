#!/usr/bin/env bash
# Answer the demo's test questions with two baselines of the evidence run, and its development questions with every fixed number of
# documents, so that the best fixed number is not chosen on the test questions.
#     bash experiments/baselines.sh configs/demo.env
# - k from the question alone: the SFT and the DPO model answer from the reranker's first k documents, with k predicted from the
#   embedding of the question. No document is read for the choice. The prediction is trained on the labelled training questions.
# - SFT with top 3: a model that is trained like the SFT model, from the same warm-up and rows, but whose answers are learned from the
#   first three documents instead of the labelled ones. It answers from the first three.
source "$(dirname "$0")/../scripts/common.sh"
needs "$WORK/eval_data/test.jsonl" scripts/03_rerank.sh
needs "$MODEL_DIR/sft/config.json" scripts/05_sft.sh

question=$WORK/eval_data/test_question.jsonl
# shellcheck disable=SC2086  # RETRIEVER_FLAGS is a list of flags
[[ -f $question ]] || python experiments/question_k.py --encoder "$RETRIEVER" ${RETRIEVER_FLAGS:-} --n_docs "$N_DOCS_SHOWN" \
    --train_files "$WORK"/training_data/retrieval_data_rerank_{sequence,normal}.jsonl --input_file "$WORK/eval_data/test.jsonl" --output_file "$question"
for model in sft dpo; do
    [[ ! -f $MODEL_DIR/$model/config.json ]] || \
        infer "$MODEL_DIR/$model" "$WORK/results/{input}_${model}_{selector}.json" monot5 "$N_DOCS_SHOWN" "$question"
done

if [[ -f $WORK/eval_data/dev.jsonl && -f $MODEL_DIR/dpo/config.json ]]; then
    infer "$MODEL_DIR/dpo" "$WORK/results/{input}_dpo_{selector}.json" "none top:1 top:2 top:3 all" "$N_DOCS_SHOWN" "$WORK/eval_data/dev.jsonl"
fi

# shellcheck disable=SC2086
fit_to "$SFT_RECIPE" "${CHAT_MODEL:-$BASE_MODEL}" ${SFT_FLAGS:-}
python construct_generator_sft.py "${PROMPT_FLAGS[@]}" "${FIT_FLAGS[@]}" --documents top:3 \
    --input_file "$WORK/training_data/training_data_sft.jsonl" --output_file "$WORK/training_data/generator_sft_top3.json"
# shellcheck disable=SC2046,SC2086  # SFT_DATA and SFT_FLAGS are lists
train sft_top3 "$SFT_RECIPE" "$WORK"/training_data/{reranker_bc_training,generator_sft_top3}.json ${SFT_DATA:-} $(version_of "$BASE_MODEL") -- \
    model_name_or_path="$BASE_MODEL" ${SFT_FLAGS/generator_sft/generator_sft_top3}
infer "$MODEL_DIR/sft_top3" "$WORK/results/{input}_sft_top3_{selector}.json" top:3 "$N_DOCS_SHOWN" "$WORK/eval_data/test.jsonl"
