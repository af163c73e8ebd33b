#!/usr/bin/env bash
# Make the tables of docs/evidence.md. The demo's chain runs from several seeds, with more questions and rounds of DPO, and compares all
# selectors under the same generators.
#     bash experiments/evidence.sh                          three seeds, about 75 minutes each on two cores
#     SEEDS="1" DEMO_SIZE=standard bash experiments/evidence.sh
# The same command continues after an interruption, or with more SEEDS. The figures of a seed are one small file, EVIDENCE/seed_N.json.
# A seed whose file exists does not run again, so that files may come from other machines.
set -euo pipefail
cd "$(dirname "$0")/.."
export DEMO_SIZE=${DEMO_SIZE:-evidence} ROUNDS=${ROUNDS:-2}
export STAGES="sft dpo"  # dpo is the last round; the best round on few questions is the best by chance
export TOP_N=""  # no answers from more documents than fit in one window
SEEDS=${SEEDS:-1 2 3}
EVIDENCE=${EVIDENCE:-runs/evidence}
MODEL=${MODEL:-smollm2_135m}

[[ -x .venv/bin/python ]] || bash scripts/setup.sh
files=()
for SEED in $SEEDS; do
    export SEED WORK=$EVIDENCE/seed_$SEED
    files+=("$WORK.json")
    [[ -f $WORK.json ]] && continue
    echo "== seed $SEED" >&2
    bash scripts/demo.sh
    bash experiments/oracle.sh configs/demo.env
    for stage in sft dpo; do
        choice=$WORK/results/test_${stage}_choice.json
        [[ -f $choice ]] && continue
        echo "selections of the $stage model, with every needed document shown, in the retriever's order and shuffled" >&2
        .venv/bin/python examples/factbook/choice.py --model "$WORK/DynamicRAG_$MODEL/$stage" \
            --input_file "$WORK/output/retrieval_test.jsonl" --output_file "$choice"
    done
    .venv/bin/python experiments/evidence_seed.py --run "$WORK" --output_file "$WORK.json"
done
.venv/bin/python experiments/evidence.py --seeds "${files[@]}" --output_dir "$EVIDENCE"
