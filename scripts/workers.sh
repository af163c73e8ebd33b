# shellcheck shell=bash
# Who works on what: the GPUs of this machine, the parts of a file, and the workers that do them; sourced by common.sh. A file is
# divided into parts; a worker has GPUs of its own and does one part at a time.

# visible_gpus: the GPUs to use, one per line: CUDA_VISIBLE_DEVICES if it is set, read as CUDA reads it (what follows the first
# entry that is no GPU does not count: "" and -1 mean none), else all that nvidia-smi lists.
visible_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr -d ' ' <<<"$CUDA_VISIBLE_DEVICES" | tr , '\n' | awk '!/^([0-9]+|(GPU|MIG)-.+)$/ { exit } 1'
    else
        nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -E '^[0-9]+$' || true
    fi
}
export CUDA_DEVICE_ORDER=${CUDA_DEVICE_ORDER:-PCI_BUS_ID}  # nvidia-smi's order; CUDA's own is the fastest GPU first
mapfile -t GPUS < <(visible_gpus)
[[ ${#GPUS[@]} -gt 0 || ${CUDA_VISIBLE_DEVICES:-} == @(|-*|NoDevFiles|void|none) ]] || \
    echo "warning: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names no GPU: the CPU is used" >&2
TWICE=$(printf '%s\n' "${GPUS[@]}" | sort | uniq -d | head -n 1)
[[ -z $TWICE ]] || refuse "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: names GPU $TWICE twice, and CUDA then uses none; name each GPU once"

# engine_size: the tensor parallel size in ENGINE_FLAGS, if they name it. A worker has that many GPUs unless GPUS_PER_SHARD says otherwise.
engine_size() { sed -nE 's/.*--tensor[-_]parallel[-_]size[ =]+([0-9]+).*/\1/p' <<<"${ENGINE_FLAGS:-}"; }
ASKED_SIZE=$(engine_size)
GPUS_PER_SHARD=${GPUS_PER_SHARD:-${ASKED_SIZE:-1}}
[[ $GPUS_PER_SHARD =~ ^[1-9][0-9]*$ ]] || refuse "GPUS_PER_SHARD=$GPUS_PER_SHARD: expected a number of GPUs, 1 or more"
[[ ${NUM_SHARDS:-1} =~ ^[1-9][0-9]*$ ]] || refuse "NUM_SHARDS=$NUM_SHARDS: expected a number of parts, 1 or more"
if ((${#GPUS[@]})); then
    ((GPUS_PER_SHARD <= ${#GPUS[@]})) || refuse "GPUS_PER_SHARD=$GPUS_PER_SHARD: more than the GPUs to use (${#GPUS[@]}); lower it or use more"
    WORKERS=$((${#GPUS[@]} / GPUS_PER_SHARD))
    [[ -n $ASKED_SIZE ]] || ENGINE_FLAGS="${ENGINE_FLAGS:-} --tensor-parallel-size $GPUS_PER_SHARD"
else
    WORKERS=${NUM_SHARDS:-1}
fi
# SHARDS="4 5 6 7": only these of the NUM_SHARDS parts, on this machine; other machines do the others.
SHARDS=${SHARDS:-}
[[ -z $SHARDS || -n ${NUM_SHARDS:-} ]] || refuse "SHARDS=\"$SHARDS\" needs NUM_SHARDS, the number of parts on all machines together"
NUM_SHARDS=${NUM_SHARDS:-$WORKERS}
for number in $SHARDS; do
    [[ $number =~ ^(0|[1-9][0-9]*)$ && $number -lt $NUM_SHARDS ]] || refuse "SHARDS=\"$SHARDS\": $number is no part of NUM_SHARDS=$NUM_SHARDS; they are 0 to $((NUM_SHARDS - 1))"
done

gpus_of() { # WORKER: its GPUs, separated by commas
    ((${#GPUS[@]})) || return 0
    local IFS=, first=$(($1 * GPUS_PER_SHARD % ${#GPUS[@]}))
    echo "${GPUS[*]:first:GPUS_PER_SHARD}"
}

# begun OUTPUT: whether a stage has finished OUTPUT, or begun it and been interrupted.
begun() { [[ -f $1.manifest.json || -f $1.partial.manifest.json ]]; }

# made_with KEY MANIFEST...: the number that the first of these manifests which exists has for the argument KEY.
made_with() {
    local key=$1 manifest
    shift
    for manifest in "$@"; do
        [[ -f $manifest ]] || continue
        sed -nE "s/.*\"$key\": ?([0-9]+).*/\1/p;T;q" "$manifest"
        return
    done
}

# parts_of OUTPUT FOLDER: how many parts the input of OUTPUT is divided into: as many as an earlier run made in FOLDER; one if
# OUTPUT was begun as a whole; else NUM_SHARDS.
parts_of() {
    local made
    made=$(made_with num_splits "$2"/split_0.json{,.partial}.manifest.json)
    if [[ -z $made ]] && begun "$1" && ! grep -qs '"stage": "aggregate"' "$1.manifest.json"; then made=1; fi
    [[ -z $SHARDS || ${made:-$NUM_SHARDS} == "$NUM_SHARDS" ]] || \
        refuse "$2: an earlier run made $made parts of it; give NUM_SHARDS=$made and SHARDS of these"
    echo "${made:-$NUM_SHARDS}"
}

# embedding_shards: how many shards the embeddings have, or get.
embedding_shards() {
    local made
    made=$(made_with num_shards "$EMBEDDINGS"/passages_*.manifest.json)
    [[ -z $SHARDS || ${made:-$NUM_SHARDS} == "$NUM_SHARDS" ]] || \
        refuse "$EMBEDDINGS: an earlier run made $made shards; give NUM_SHARDS=$made and SHARDS of these"
    echo "${made:-$NUM_SHARDS}"
}

# split INPUT FOLDER PARTS: divide the rows of INPUT, once; machines that start together do it in turn.
split() {
    local turn=()
    mkdir -p "$2"
    [[ -z $SHARDS ]] || turn=(flock "$2.lock")
    "${turn[@]}" python split_data.py --input_file "$1" --output_dir "$2" --num_splits "$3"
}

# parts_here FOLDER...: the numbers of the parts in these folders that this machine does.
parts_here() {
    local folder number
    for folder in "$@"; do
        for number in "$folder"/split_*.json; do
            number=${number##*/split_}
            [[ ! ${number%.json} =~ ^[0-9]+$ ]] || echo "${number%.json}"
        done
    done | sort -nu | while read -r number; do
        [[ -n $SHARDS && " $SHARDS " != *" $number "* ]] || echo "$number"
    done
}

# in_pool COMMAND LOGS PART...: COMMAND PART for every PART, one part per worker at a time, with the GPUs of the worker and the
# log LOGSPART.log. A part that fails is named with its log; the others finish.
in_pool() {
    local command=$1 logs=$2 worker part failed=0 ended idle=()
    local -A pid_of=() worker_of=()
    shift 2
    (($#)) || return 0
    mkdir -p "$(dirname "${logs}0")"
    echo "$# parts, $((WORKERS < $# ? WORKERS : $#)) at a time; their logs are $logs*.log" >&2
    for ((worker = 0; worker < WORKERS; worker++)); do idle+=("$worker"); done
    exec {ended}<> <(:)  # the parts that have ended; bash 5.2 forgets some of those that `wait -n` should find
    trap 'end_pool 130' INT  # a shell's background work does not hear of Ctrl-C
    trap 'end_pool 143' TERM HUP
    while (($# || ${#pid_of[@]})); do
        if (($# && ${#idle[@]})); then
            CUDA_VISIBLE_DEVICES=$(gpus_of "${idle[0]}") as_group "$1" >"$logs$1.log" 2>&1 </dev/null &
            pid_of[$1]=$! worker_of[$1]=${idle[0]}
            idle=("${idle[@]:1}")
            shift
            continue
        fi
        next_ended
        [[ -n ${pid_of[$part]:-} ]] || continue
        wait "${pid_of[$part]}" || { echo "error: part $part failed; its log is $logs$part.log" >&2; failed=1; }
        idle+=("${worker_of[$part]}")
        unset "pid_of[$part]" "worker_of[$part]"
    done
    exec {ended}<&-
    trap - INT TERM HUP
    ((failed == 0)) || exit 1
}
# end_pool STATUS: end all workers, wait until they have ended, and end here.
end_pool() {
    trap '' INT TERM HUP
    kill "${pid_of[@]}" 2>/dev/null || true
    wait || true
    echo "interrupted; finished parts are kept, run the same command again to continue" >&2
    exit "$1"
}
# end_group GROUP: end a process group, and wait up to ten seconds until no process of it lives: they may have a row to finish.
end_group() {
    local tries
    trap '' INT TERM HUP
    kill -- "-$1" 2>/dev/null || return 0
    for ((tries = 0; tries < 100; tries++)); do
        { cat /proc/[0-9]*/stat 2>/dev/null || true; } |
            awk -v group="$1" '{ sub(/.*\) /, "") } $1 != "Z" && $3 == group { lives = 1 } END { exit !lives }' || return 0
        sleep 0.1
    done
}
# as_group PART: $command in a process group of its own, which ends as a whole if this process ends, however; then $ended has PART.
as_group() {
    # shellcheck disable=SC2064  # the part and the number of now
    trap "echo $1 >&$ended" EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    set -m
    "$command" "$1" &
    set +m
    # shellcheck disable=SC2064
    trap "end_group $!; echo $1 >&$ended" EXIT
    wait "$!"
}
# next_ended: set $part to one that has ended, or that was killed before it could say so.
next_ended() {
    # An empty line names no part. One has been seen on a busy machine; its cause is not known.
    until read -r -t 5 part <&"$ended" && [[ -n $part ]]; do
        for part in "${!pid_of[@]}"; do kill -0 "${pid_of[$part]}" 2>/dev/null || return 0; done
    done
}

# sharded INPUT OUTPUT COMMAND...: run COMMAND, with {in} and {out} in it replaced, on the parts of INPUT, and put them together.
# Running again does only what is missing. With SHARDS, the parts wait for a run without it.
sharded() {
    local input=$1 output=$2 parts=$2.parts total worked numbers
    shift 2
    worked=("$@")
    total=$(parts_of "$output" "$parts/in")
    if ((total == 1)); then
        run_part "$input" "$output" "${worked[@]}"
        return
    fi
    split "$input" "$parts/in" "$total"
    # shellcheck disable=SC2329  # in_pool calls it
    shard() { run_part "$parts/in/split_$1.json" "$parts/out_$1.jsonl" "${worked[@]}"; }
    mapfile -t numbers < <(parts_here "$parts/in")
    in_pool shard "$parts/" "${numbers[@]}"
    later "$output" || python aggregate.py --input_files "$parts/out_*.jsonl" --splits_dir "$parts/in" --output_file "$output"
}

# later OUTPUT: whether OUTPUT waits for the parts of other machines; says so.
later() {
    [[ -n $SHARDS ]] || return 1
    echo "parts $SHARDS of $1 are done; when all are, run the same script without SHARDS on one machine" >&2
}

run_part() {
    local in=$1 out=$2
    shift 2
    local command=("${@//\{in\}/$in}")
    "${command[@]//\{out\}/$out}"
}
