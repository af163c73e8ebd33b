#!/usr/bin/env bash
# Corpus -> embedding shards, one a GPU.
source "$(dirname "$0")/common.sh"
given PASSAGES

pids=()
for ((shard = 0; shard < NUM_SHARDS; shard++)); do
    # shellcheck disable=SC2086  # RETRIEVER_FLAGS is a list of flags
    CUDA_VISIBLE_DEVICES=$(gpus_of "$shard") python generate_passage_embeddings.py --model_name_or_path "$RETRIEVER" $RETRIEVER_FLAGS \
        --passages "$PASSAGES" --output_dir "$EMBEDDINGS" --shard_id "$shard" --num_shards "$NUM_SHARDS" &
    pids+=("$!:$shard")
done
failed=0
for worker in "${pids[@]}"; do
    wait "${worker%%:*}" || { echo "error: embedding shard ${worker##*:} failed" >&2; failed=1; }
done
exit "$failed"
