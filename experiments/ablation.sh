#!/usr/bin/env bash
# Measure what the two extra data sets of the demo's behaviour cloning are worth. The SFT is repeated without each of them, from the same
# warm-up. The models answer 500 questions with every needed passage among the documents shown, in the retriever's order and shuffled.
#     bash experiments/ablation.sh      after DEMO_SIZE=standard bash scripts/demo.sh; about 50 minutes on two cores
export DEMO_SIZE=${DEMO_SIZE:-standard}  # the default size is too small to show a difference
source "$(dirname "$0")/../scripts/common.sh" configs/demo.env
needs "$MODEL_DIR/sft/trained_on.sha256" scripts/demo.sh

folder=$WORK/ablation
[[ -f $folder/questions/test.jsonl ]] || python examples/factbook/questions.py --passages "$PASSAGES" \
    --output_dir "$folder/questions" --train 10 --reranker 10 --test 500
retrieve "$folder/questions/test.jsonl" "$folder/questions/retrieved.jsonl"
for order in retrieval shuffled; do
    [[ -f $folder/$order.jsonl ]] || python examples/factbook/oracle.py --input_file "$folder/questions/retrieved.jsonl" \
        --passages "$PASSAGES" --output_file "$folder/$order.jsonl" --n_docs "$N_DOCS_SHOWN" --order "$order"
done

for left_out in rehearsal answers; do
    kept=answers
    [[ $left_out == rehearsal ]] || kept=rehearsal
    # shellcheck disable=SC2046,SC2086  # SFT_FLAGS is a list
    train "sft_without_$left_out" sft "$WORK/training_data"/{reranker_bc_training,generator_sft_training,factbook_$kept}.json \
        $(version_of "$BASE_MODEL") -- model_name_or_path="$BASE_MODEL" ${SFT_FLAGS/factbook_rehearsal,factbook_answers/factbook_$kept}
done
choices=() answers=()
for model in sft sft_without_{rehearsal,answers}; do
    infer "$MODEL_DIR/$model" "$folder/results/{input}_${model}_{selector}.json" "dynamic gold" "$N_DOCS_SHOWN" \
        "$folder"/{retrieval,shuffled}.jsonl
    choices+=("$folder/results"/{retrieval,shuffled}_"${model}_dynamic.json")
    answers+=("$folder/results/retrieval_${model}_gold.json")
done
python evaluate.py --results_file "${choices[@]}" --group_by kind --output_file "$folder/choice.json" --table_file "$folder/choice.md"
python evaluate.py --results_file "${answers[@]}" --group_by kind --compare --output_file "$folder/answers.json" --table_file "$folder/answers.md"
