#!/usr/bin/env bash
# The evidence for docs/evidence.md: the demo's chain from several seeds, with more questions, rounds of DPO and every selector
# under the same generators, in one file of tables:
#     bash experiments/evidence.sh                          three seeds, some 75 minutes each on two cores
#     SEEDS="1" DEMO_SIZE=standard bash experiments/evidence.sh
# Everything is resumed: run it again after an interruption, or with more SEEDS. What a seed comes to is one small file,
# EVIDENCE/seed_N.json, and a seed that has its file is not run again, whichever machine it ran on.
set -euo pipefail
cd "$(dirname "$0")/.."
export DEMO_SIZE=${DEMO_SIZE:-evidence} ROUNDS=${ROUNDS:-2}
export STAGES="sft dpo"  # of the rounds, the last; the best on few questions is the best by chance
export TOP_N=""  # nothing here is about more documents than a window holds
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
        echo "what the $stage model chooses when every needed document is shown, in the retriever's order and shuffled" >&2
        .venv/bin/python examples/factbook/choice.py --model "$WORK/DynamicRAG_$MODEL/$stage" \
            --input_file "$WORK/output/retrieval_test.jsonl" --output_file "$choice"
    done
    .venv/bin/python experiments/evidence_seed.py --run "$WORK" --output_file "$WORK.json"
done
.venv/bin/python experiments/evidence.py --seeds "${files[@]}" --output_dir "$EVIDENCE"
