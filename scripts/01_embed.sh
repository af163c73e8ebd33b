#!/usr/bin/env bash
# Corpus -> embedding shards. If an earlier run has started, its number of shards is kept.
source "$(dirname "$0")/common.sh"
given_inputs

total=$(embedding_shards)
embed() { # SHARD
    # shellcheck disable=SC2086  # RETRIEVER_FLAGS is a list of flags
    python generate_passage_embeddings.py --model_name_or_path "$RETRIEVER" ${RETRIEVER_FLAGS:-} \
        --passages "$PASSAGES" --output_dir "$EMBEDDINGS" --shard_id "$1" --num_shards "$total"
}
if ((total == 1)); then
    undivided embed "$WORK/logs/embed_"
else
    # shellcheck disable=SC2046,SC2086  # lists of numbers
    in_pool embed "$WORK/logs/embed_" ${SHARDS:-$(seq 0 $((total - 1)))}
fi
