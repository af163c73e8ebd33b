#!/usr/bin/env bash
# The evidence for docs/evidence.md: the demo's chain from several seeds, with more questions, rounds of DPO and every selector
# under the same generators, in one table of differences with their intervals:
#     bash scripts/evidence.sh                          three seeds, some two hours each on two cores
#     SEEDS="1" DEMO_SIZE=default bash scripts/evidence.sh
# Everything is resumed: run it again after an interruption, or with more SEEDS.
set -euo pipefail
cd "$(dirname "$0")/.."
export DEMO_SIZE=${DEMO_SIZE:-evidence} ROUNDS=${ROUNDS:-2}
SEEDS=${SEEDS:-1 2 3}
EVIDENCE=${EVIDENCE:-runs/evidence}

folders=()
for SEED in $SEEDS; do
    export SEED WORK=$EVIDENCE/seed_$SEED
    echo "== seed $SEED" >&2
    bash scripts/demo.sh
    bash scripts/oracle.sh configs/demo.env
    folders+=("$WORK")
done
.venv/bin/python scripts/evidence.py --runs "${folders[@]}" --output_dir "$EVIDENCE"
