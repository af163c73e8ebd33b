#!/usr/bin/env bash
# Published data sets, corpora and models -> files of this project, by the names of `python prepare_data.py --list`:
#     PREPARE="dynamicrag contriever-msmarco" PREPARE_FLAGS=--dry_run bash scripts/00_prepare.sh configs/llama3_8b.env
asked=${HF_HUB_OFFLINE:-0}  # unlike the other stages, this one uses the hub unless it is told not to
source "$(dirname "$0")/common.sh"
export HF_HUB_OFFLINE=$asked

# shellcheck disable=SC2086  # lists of names and of flags
python prepare_data.py --name ${PREPARE:-dynamicrag} --output_dir "${PREPARED:-data/prepared}" ${PREPARE_FLAGS:-}
