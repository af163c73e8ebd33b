# shellcheck shell=bash
# The GPUs of this machine, the parts of a file, and the workers; common.sh sources this file. A file is divided into parts. A worker
# processes one part at a time, on one or more GPUs that no other worker uses. LAUNCHER=ray uses the nodes of a Ray cluster instead.

LAUNCHER=${LAUNCHER:-local}
[[ $LAUNCHER == @(local|ray) ]] || refuse "LAUNCHER=$LAUNCHER: expected local or ray"

# visible_gpus: print the GPUs to use, one per line. They are those of CUDA_VISIBLE_DEVICES if it is set, otherwise all that
# nvidia-smi lists. As in CUDA, the list ends at the first entry that is not a GPU; "" and -1 mean no GPU.
visible_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr -d ' ' <<<"$CUDA_VISIBLE_DEVICES" | tr , '\n' | awk '!/^([0-9]+|(GPU|MIG)-.+)$/ { exit } 1'
    else
        nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -E '^[0-9]+$' || true
    fi
}
export CUDA_DEVICE_ORDER=${CUDA_DEVICE_ORDER:-PCI_BUS_ID}  # the order of nvidia-smi; by default CUDA lists the fastest GPU first
mapfile -t GPUS < <(visible_gpus)
[[ ${#GPUS[@]} -gt 0 || ${CUDA_VISIBLE_DEVICES:-} == @(|-*|NoDevFiles|void|none) ]] || \
    echo "warning: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: names no GPU; the CPU is used" >&2
TWICE=$(printf '%s\n' "${GPUS[@]}" | sort | uniq -d | head -n 1)
[[ -z $TWICE ]] || refuse "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: names GPU $TWICE twice, so that CUDA uses no GPU; name each GPU once"

# engine_size: print the tensor parallel size of ENGINE_FLAGS, if they set it. A worker gets as many GPUs unless GPUS_PER_SHARD is set.
engine_size() { sed -nE 's/.*--tensor[-_]parallel[-_]size[ =]+([0-9]+).*/\1/p' <<<"${ENGINE_FLAGS:-}"; }
ASKED_SIZE=$(engine_size)
GPUS_PER_SHARD=${GPUS_PER_SHARD:-${ASKED_SIZE:-1}}
[[ $GPUS_PER_SHARD =~ ^[1-9][0-9]*$ ]] || refuse "GPUS_PER_SHARD=$GPUS_PER_SHARD: not a number of GPUs; give 1 or more"
[[ ${NUM_SHARDS:-1} =~ ^[1-9][0-9]*$ ]] || refuse "NUM_SHARDS=$NUM_SHARDS: not a number of parts; give 1 or more"
[[ ${PARTS_PER_GPU:-1} =~ ^[1-9][0-9]*$ ]] || refuse "PARTS_PER_GPU=$PARTS_PER_GPU: not a number of parts; give 1 or more"
if [[ $LAUNCHER == ray && -n ${RAY_ADDRESS:-} ]]; then
    WORKERS=""  # new_parts asks the cluster
    [[ -n $ASKED_SIZE ]] || ENGINE_FLAGS="${ENGINE_FLAGS:-} --tensor-parallel-size $GPUS_PER_SHARD"
elif ((${#GPUS[@]})); then
    ((GPUS_PER_SHARD <= ${#GPUS[@]})) || refuse "GPUS_PER_SHARD=$GPUS_PER_SHARD: only ${#GPUS[@]} GPUs can be used; give at most ${#GPUS[@]}, or use more GPUs"
    WORKERS=$((${#GPUS[@]} / GPUS_PER_SHARD))
    [[ -n $ASKED_SIZE ]] || ENGINE_FLAGS="${ENGINE_FLAGS:-} --tensor-parallel-size $GPUS_PER_SHARD"
else
    WORKERS=${NUM_SHARDS:-1}
fi
# SHARDS="4 5 6 7": this machine processes only these of the NUM_SHARDS parts; other machines process the others.
SHARDS=${SHARDS:-}
[[ -z $SHARDS || -n ${NUM_SHARDS:-} ]] || refuse "SHARDS=\"$SHARDS\": NUM_SHARDS is not set; set it to the number of parts on all machines together"
# Without NUM_SHARDS there are PARTS_PER_GPU parts per worker. With more than one, no worker waits long for the last part of another.
NUM_SHARDS=${NUM_SHARDS:-${WORKERS:+$((WORKERS * ${PARTS_PER_GPU:-1}))}}
for number in $SHARDS; do
    [[ $number =~ ^(0|[1-9][0-9]*)$ && $number -lt $NUM_SHARDS ]] || refuse "SHARDS=\"$SHARDS\": part $number does not exist; with NUM_SHARDS=$NUM_SHARDS the parts are 0 to $((NUM_SHARDS - 1))"
done

# JOIN_ONLY=1: a script only joins the parts that have been made, and exits with an error if one is missing.
JOIN_ONLY=${JOIN_ONLY:-}
[[ -z $JOIN_ONLY || -z $SHARDS ]] || refuse "JOIN_ONLY=$JOIN_ONLY and SHARDS=\"$SHARDS\": parts are joined without SHARDS; set only one of them"

gpus_of() { # WORKER: print its GPUs, separated by commas
    ((${#GPUS[@]})) || return 0
    local IFS=, first=$(($1 * GPUS_PER_SHARD % ${#GPUS[@]}))
    echo "${GPUS[*]:first:GPUS_PER_SHARD}"
}

# started OUTPUT: return whether a stage has started OUTPUT; it may have finished it.
started() { [[ -f $1.manifest.json || -f $1.partial.manifest.json ]]; }

# made_with KEY MANIFEST...: print the numeric argument KEY of the first of these manifests that exists.
made_with() {
    local key=$1 manifest
    shift
    for manifest in "$@"; do
        [[ -f $manifest ]] || continue
        sed -nE "s/.*\"$key\": ?([0-9]+).*/\1/p;T;q" "$manifest"
        return
    done
}

# new_parts: print the number of parts of a file that no earlier run has divided: NUM_SHARDS, or as many as fit the Ray cluster.
new_parts() {
    local workers
    if [[ -n $NUM_SHARDS ]]; then
        echo "$NUM_SHARDS"
        return
    fi
    workers=$(launch --workers)
    echo $((workers * ${PARTS_PER_GPU:-1}))
}
launch() { CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${GPUS[*]}") python scripts/launch.py --gpus "$GPUS_PER_SHARD" --local_gpus "${#GPUS[@]}" "$@"; }

# made_or_new MADE FOLDER NAME: print MADE, the number of NAME in FOLDER that an earlier run made, or else new_parts. With SHARDS, which
# numbers the parts of all machines, MADE must be NUM_SHARDS.
made_or_new() {
    [[ -z $SHARDS || ${1:-$NUM_SHARDS} == "$NUM_SHARDS" ]] || \
        refuse "$2: an earlier run made $1 $3; give NUM_SHARDS=$1, and SHARDS from 0 to $(($1 - 1))"
    if [[ -n $1 ]]; then echo "$1"; else new_parts; fi
}

# parts_of OUTPUT FOLDER: print the number of parts into which the input of OUTPUT is divided: as many as an earlier run made in
# FOLDER, or 1 if an earlier run started OUTPUT undivided, otherwise new_parts.
parts_of() {
    local made
    made=$(made_with num_splits "$2"/split_0.json{,.partial}.manifest.json)
    if [[ -z $made ]] && started "$1" && ! grep -qs '"stage": "aggregate"' "$1.manifest.json"; then made=1; fi
    made_or_new "$made" "$2" parts
}

# embedding_shards: print the number of shards that the embeddings have or will have.
embedding_shards() {
    local made
    made=$(made_with num_shards "$EMBEDDINGS"/passages_*.manifest.json)
    made_or_new "$made" "$EMBEDDINGS" shards
}

# only_join FILE...: return whether JOIN_ONLY is set. If it is, exits with an error that names those of the files that are not finished.
only_join() {
    local file missing=()
    [[ -n $JOIN_ONLY ]] || return 1
    for file; do [[ -f $file.manifest.json ]] || missing+=("$file"); done
    ((${#missing[@]} == 0)) || refuse "${missing[*]}: not finished, and with JOIN_ONLY=$JOIN_ONLY no part is made;" \
        "make them with the same script without JOIN_ONLY, or with SHARDS on another machine"
}

# split INPUT FOLDER PARTS: divide the rows of INPUT into PARTS files of FOLDER, once. A lock keeps machines from doing it at the same time.
split() {
    local turn=()
    mkdir -p "$2"
    [[ -z $SHARDS ]] || turn=(flock "$2.lock")
    "${turn[@]}" python split_data.py --input_file "$1" --output_dir "$2" --num_splits "$3"
}

# parts_here FOLDER...: print the numbers of the parts in these folders that this machine processes.
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

# in_pool COMMAND LOGS PART...: run COMMAND PART for every PART, on as many parts at a time as there are workers. A part sees the GPUs
# of its worker and writes the log LOGSPART.log. An error names each part that fails and its log; the other parts still finish.
# COMMAND is a function that runs one python command.
in_pool() {
    local command=$1 logs=$2 worker part lines failed=0 ended idle=()
    local -A pid_of=() worker_of=()
    shift 2
    (($#)) || return 0
    mkdir -p "$(dirname "${logs}0")"
    if [[ $LAUNCHER == ray ]]; then
        lines=$(command_lines "$command" "$@")
        launch --logs "$logs" <<<"$lines"
        return
    fi
    echo "$# parts, $((WORKERS < $# ? WORKERS : $#)) at a time; their logs are $logs*.log" >&2
    for ((worker = 0; worker < WORKERS; worker++)); do idle+=("$worker"); done
    exec {ended}<> <(:)  # receives the parts that have ended; `wait -n` of bash 5.2 misses some of them
    trap 'end_pool 130' INT  # Ctrl-C does not reach the background jobs of a shell
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
        wait "${pid_of[$part]}" || { echo "error: part $part failed; see its log, $logs$part.log" >&2; failed=1; }
        idle+=("${worker_of[$part]}")
        unset "pid_of[$part]" "worker_of[$part]"
    done
    exec {ended}<&-
    trap - INT TERM HUP
    ((failed == 0)) || exit 1
}
# command_lines FUNCTION PART...: for every PART print PART, a tab, and the command line that FUNCTION runs for it.
command_lines() {
    local function=$1 part
    shift
    # shellcheck disable=SC2329  # the function calls it
    python() { printf '%q ' python "$@"; echo; }
    for part; do
        printf '%s\t' "$part"
        "$function" "$part"
    done
}
# undivided FUNCTION LOGS: run FUNCTION 0, which processes a whole file: here, or on a node of the Ray cluster.
undivided() { if [[ $LAUNCHER == local ]]; then "$1" 0; else in_pool "$1" "$2" 0; fi; }
# end_pool STATUS: stop all workers, wait until they have ended, and exit with STATUS.
end_pool() {
    trap '' INT TERM HUP
    kill "${pid_of[@]}" 2>/dev/null || true
    wait || true
    echo "interrupted; finished parts are kept: run the same command again to continue" >&2
    exit "$1"
}
# end_group GROUP: stop a process group, and wait up to ten seconds until all its processes have ended. They may have a row to finish.
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
# as_group PART: run $command in a separate process group. However this process ends, it stops the whole group and writes PART to $ended.
as_group() {
    # shellcheck disable=SC2064  # the values of now, not of the time of the signal
    trap "echo $1 >&$ended" EXIT
    # A second signal, such as end_pool's after Ctrl-C, must not end the trap of EXIT.
    trap "trap '' INT TERM HUP; exit 130" INT
    trap "trap '' INT TERM HUP; exit 143" TERM HUP
    set -m
    "$command" "$1" &
    set +m
    # shellcheck disable=SC2064
    trap "end_group $!; echo $1 >&$ended" EXIT
    wait "$!"
}
# next_ended: set $part to a part that has ended, or that was killed before it could write to $ended.
next_ended() {
    # An empty line is not a part. One was seen once, on a busy machine; its cause is unknown.
    until read -r -t 5 part <&"$ended" && [[ -n $part ]]; do
        for part in "${!pid_of[@]}"; do kill -0 "${pid_of[$part]}" 2>/dev/null || return 0; done
    done
}

# sharded INPUT OUTPUT COMMAND...: run COMMAND on every part of INPUT, and join the results to OUTPUT. {in} and {out} in COMMAND are
# replaced by the files of the part. A second run processes only missing parts. With SHARDS the parts are not joined; a run with JOIN_ONLY=1
# does that.
sharded() {
    local input=$1 output=$2 parts=$2.parts total worked numbers made
    shift 2
    worked=("$@")
    total=$(parts_of "$output" "$parts/in")
    if ((total == 1)); then
        # shellcheck disable=SC2329  # undivided calls it
        whole() { run_part "$input" "$output" "${worked[@]}"; }
        only_join "$output" || undivided whole "$output."
        return
    fi
    split "$input" "$parts/in" "$total"
    # shellcheck disable=SC2329  # in_pool calls it
    shard() { run_part "$parts/in/split_$1.json" "$parts/out_$1.jsonl" "${worked[@]}"; }
    mapfile -t numbers < <(parts_here "$parts/in")
    made=("${numbers[@]/#/$parts/out_}")
    only_join "${made[@]/%/.jsonl}" || in_pool shard "$parts/" "${numbers[@]}"
    later "$output" || python aggregate.py --input_files "$parts/out_*.jsonl" --splits_dir "$parts/in" --output_file "$output"
}

# later OUTPUT: return whether OUTPUT needs parts of other machines, and print a message if it does.
later() {
    [[ -n $SHARDS ]] || return 1
    echo "$1: parts $SHARDS are finished; when all parts are, run the same script with JOIN_ONLY=1 and without SHARDS on one machine" >&2
}

run_part() {
    local in=$1 out=$2
    shift 2
    local command=("${@//\{in\}/$in}")
    "${command[@]//\{out\}/$out}"
}
