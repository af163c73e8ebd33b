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
mapfile -t numbers < <(tr ' ' '\n' <<<"${SHARDS:-$(seq 0 $((total - 1)))}")
for number in "${numbers[@]}"; do made+=("$EMBEDDINGS/passages_$(printf %02d "$number").npy"); done
only_join "${made[@]}" && exit  # shards of embeddings are not joined
if ((total == 1)); then
    undivided embed "$WORK/logs/embed_"
else
    in_pool embed "$WORK/logs/embed_" "${numbers[@]}"
fi
