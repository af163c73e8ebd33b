#!/usr/bin/env bash
# Make the tables of the evidence run. The demo's chain runs from several seeds, with more questions and rounds of DPO, and compares all
# selectors under the same generators, and with baselines.
#     bash experiments/evidence.sh                          three seeds from the reranker's labels; docs/evidence.md gives the time
#     LABELS=gold bash experiments/evidence.sh              from gold labels, with the gold selection among the samples for DPO
#     SEEDS="1" DEMO_SIZE=standard bash experiments/evidence.sh
# The test questions are none that was asked before: not those of the demo, of the learning curves and of the first evidence run. The
# fixed number of documents is chosen on questions about other countries than those of training and test.
# The same command continues after an interruption, or with more SEEDS. The figures of a seed are one small file, EVIDENCE/seed_N.json.
# A seed whose file exists does not run again, so that files may come from other machines.
set -euo pipefail
cd "$(dirname "$0")/.."
export DEMO_SIZE=${DEMO_SIZE:-evidence} ROUNDS=${ROUNDS:-2} LABELS=${LABELS:-reranker} HELD_OUT_SIZE=${HELD_OUT_SIZE:-240}
export STAGES="sft dpo"  # dpo is the last round; the best round on few questions is the best by chance
export TOP_N=""  # no answers from more documents than fit in one window
SEEDS=${SEEDS:-1 2 3}
EVIDENCE=${EVIDENCE:-runs/evidence_$LABELS}
MODEL=${MODEL:-smollm2_135m}
PASSAGES=${PASSAGES:-data/factbook/passages.jsonl}
USED="50 160 500"  # sizes of the test sets of the demo and of the first evidence run

[[ -x .venv/bin/python ]] || bash scripts/setup.sh
[[ -f $PASSAGES ]] || .venv/bin/python examples/factbook/corpus.py --output_file "$PASSAGES" --max_words 30
EXCLUDE=""
for size in $USED; do
    [[ -f $EVIDENCE/used_$size/reranker.jsonl ]] || .venv/bin/python examples/factbook/questions.py --passages "$PASSAGES" \
        --output_dir "$EVIDENCE/used_$size" --train 10 --reranker 10 --test "$size"
    EXCLUDE+=" $EVIDENCE/used_$size/test.jsonl"
done
export EXCLUDE
files=()
for SEED in $SEEDS; do
    export SEED WORK=$EVIDENCE/seed_$SEED
    files+=("$WORK.json")
    [[ -f $WORK.json ]] && continue
    echo "== seed $SEED, labels of the $LABELS" >&2
    bash scripts/demo.sh
    bash experiments/baselines.sh configs/demo.env
    EVAL_QUESTIONS=$WORK/questions/test.jsonl bash experiments/oracle.sh configs/demo.env
    for stage in sft dpo; do
        choice=$WORK/results/test_${stage}_choice.json
        [[ -f $choice ]] && continue
        echo "selections of the $stage model, with every needed document shown, in the retriever's order and shuffled" >&2
        .venv/bin/python examples/factbook/choice.py --model "$WORK/DynamicRAG_$MODEL/$stage" \
            --input_file "$WORK/output/retrieval_test.jsonl" --output_file "$choice"
    done
    .venv/bin/python experiments/evidence_seed.py --run "$WORK" --labels "$LABELS" --output_file "$WORK.json"
done
.venv/bin/python experiments/evidence.py --seeds "${files[@]}" --output_dir "$EVIDENCE"
