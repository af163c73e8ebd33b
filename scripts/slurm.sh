#!/usr/bin/env bash
# Run a numbered script on the nodes of a Slurm job. The job starts a Ray cluster on its nodes, runs the script on the first of them with
# LAUNCHER=ray, and stops the cluster. If Slurm requeues the job, it continues.
#     sbatch --nodes=4 --gpus-per-node=8 scripts/slurm.sh scripts/01_embed.sh configs/llama3_8b.env
#SBATCH --ntasks-per-node=1 --exclusive --requeue --open-mode=append
# The nodes are used alone, because `ray stop` ends every Ray of the user. RAY_FLAGS are flags of `ray start`.
set -euo pipefail
[[ -n ${SLURM_JOB_NODELIST:-} ]] || { echo "error: $0: not in a Slurm job; start it with sbatch, as its first lines show" >&2; exit 2; }
cd "$SLURM_SUBMIT_DIR"
[[ -f scripts/common.sh ]] || { echo "error: $PWD: not the project's folder; start sbatch there" >&2; exit 2; }
PATH="$PWD/.venv/bin:$PATH"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun ray stop --force  # what a requeued job has left, unless Slurm has ended it
# shellcheck disable=SC2086  # a list of flags
srun ray symmetric-run --address "$head:${RAY_PORT:-6379}" --min-nodes "$SLURM_JOB_NUM_NODES" ${RAY_FLAGS:-} -- env LAUNCHER=ray RAY_ADDRESS=auto bash "$@"
