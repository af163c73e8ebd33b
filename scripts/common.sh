# shellcheck shell=bash
# What the numbered scripts share; sourced by each. Settings come from one env file, configs/*.env:
#     bash scripts/02_retrieve.sh configs/demo.env
# and a variable set in the environment wins over the file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# refuse MESSAGE: end here; the message is one line, "<place>: <what is wrong>; <what to do>".
refuse() {
    echo "error: $*" >&2
    exit 2
}
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || refuse "bash $BASH_VERSION: too old; the scripts need bash 4.4 or newer"

CONFIG=${1:-${CONFIG:-configs/llama3_8b.env}}
[[ -f $CONFIG ]] || refuse "$CONFIG: no such settings file; see configs/"
ASKED_WORK=${WORK:-}
# shellcheck source=configs/llama3_8b.env
source <(tr -d '\r' <"$CONFIG")  # an editor on Windows ends lines with a carriage return

[[ $WORK == "${ASKED_WORK:-$WORK}" ]] || refuse "$CONFIG sets WORK over the environment; write WORK=\${WORK:-...}"

PATH="$PWD/.venv/bin:$PATH"
LLAMAFACTORY=${LLAMAFACTORY:-.venv-train/bin/llamafactory-cli}
export PYTHONUNBUFFERED=1
# Models in folders never need a hub; HF_HUB_OFFLINE=0 lets hub names be looked up.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# ---- GPUs, workers and parts. A file is divided into parts; a worker has GPUs of its own and does one part at a time.

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
# Flags of every stage that writes a prompt.
PROMPT_FLAGS=()
# shellcheck disable=SC2034  # used by the scripts that source this
[[ -z ${PROMPTS:-} ]] || PROMPT_FLAGS=(--prompts "$PROMPTS")
MODEL_DIR=$WORK/DynamicRAG_$MODEL
# The model that samples and that DPO starts from, and the recipes of recipes/$MODEL: sft, sft_lora or sft_qlora; dpo, dpo_ftx,
# simpo, dpo_lora or dpo_qlora.
POLICY=${POLICY:-$MODEL_DIR/sft}
SFT_RECIPE=${SFT_RECIPE:-sft}
DPO_RECIPE=${DPO_RECIPE:-dpo}

# The evaluation sets, as SET=FILE: EVAL_QUESTIONS get their documents here, the rows of EVAL_FILES have some already. A set is called
# by the name of its file, and so are its results.
stem() { basename "${1%.*}"; }
with_folder() { echo "$(dirname "$1")/$(basename "$(realpath -sm "$(dirname "$1")")")_$(basename "$1")"; }
SETS=()
# shellcheck disable=SC2153  # both are settings
for file in ${EVAL_QUESTIONS:-} ${EVAL_FILES:-}; do
    name=$(stem "$file")
    for other in "${SETS[@]}"; do
        [[ ${other%%=*} != "$name" ]] || refuse "${other#*=} and $file: two evaluation sets are called $name, and would write the same files;" \
            "rename one so that its name keeps the data set (EVAL_QUESTIONS, EVAL_FILES): $(with_folder "$file")"
    done
    SETS+=("$name=$file")
done
# given_inputs: end here if a file that the settings name for the first stages is not there.
given_inputs() {
    local set
    given PASSAGES
    given TRAIN_QUESTIONS
    for set in "${SETS[@]}"; do
        [[ -e ${set#*=} ]] || refuse "${set#*=} is missing; $CONFIG names it as an evaluation set${MAKER:+; $MAKER makes it}"
    done
}

# needs FILE SCRIPT: end here if FILE is missing, naming the script that makes it.
needs() {
    [[ -e $1 ]] || refuse "$1 is missing; make it with: bash $2 $CONFIG"
}

# given VARIABLE: end here if the file that a setting names is not there.
given() {
    [[ -e ${!1} ]] || refuse "${!1} is missing; $CONFIG names it as $1${MAKER:+; $MAKER makes it}"
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
    local folder part
    for folder in "$@"; do
        for part in "$folder"/split_*.json; do
            part=${part##*/split_}
            [[ ! ${part%.json} =~ ^[0-9]+$ ]] || echo "${part%.json}"
        done
    done | sort -nu | while read -r part; do
        [[ -n $SHARDS && " $SHARDS " != *" $part "* ]] || echo "$part"
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
    until read -r -t 5 part <&"$ended"; do
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

# retrieve QUESTIONS OUTPUT: the questions with the documents of the settings' retriever.
retrieve() {
    # shellcheck disable=SC2086  # RETRIEVER_FLAGS and SEARCH_FLAGS are lists of flags
    sharded "$1" "$2" python retriever.py --model_name_or_path "$RETRIEVER" ${RETRIEVER_FLAGS:-} --passages "$PASSAGES" \
        --passages_embeddings "$EMBEDDINGS/*" --query '{in}' --output_file '{out}' --n_docs "$N_DOCS_RETRIEVED" ${SEARCH_FLAGS:-}
}

# answer SCRIPT MODEL OUTPUT CHOICE VALUES FLAG... -- FILE...: SCRIPT (inference.py or top_inference.py) with MODEL on evaluation
# files, once for each of the VALUES of its flag CHOICE; OUTPUT names the results with {input} and {CHOICE}. The questions of
# every file are divided: a worker gets a part of all files, so it loads the model once, and the answers are put together.
answer() {
    local script=$1 model=$2 output=$3 choice=$4 values=$5 parts logs flags=() whole=() divided=() numbers=() file part total
    shift 5
    while [[ $1 != -- ]]; do flags+=("$1"); shift; done
    shift
    parts=$(dirname "$output")/parts
    for file in "$@"; do
        total=$(parts_of_answers "$file")
        if ((total == 1)); then
            whole+=("$file")
            continue
        fi
        divided+=("$file")
        split "$file" "$parts/split/$(stem "$file")" "$total"
        for part in $(parts_here "$parts/split/$(stem "$file")"); do
            mkdir -p "$parts/in/$part"  # a link, by which a part has the name of its file
            ln -sfn "../../split/$(stem "$file")/split_$part.json" "$parts/in/$part/$(stem "$file").json"
            numbers+=("$part")
        done
    done
    [[ ${#whole[@]} == 0 || -n $SHARDS ]] || ask "$output" "${output%.json}_remain.json" "${whole[@]}"
    ((${#divided[@]})) || return 0
    mapfile -t numbers < <(printf '%s\n' "${numbers[@]}" | sort -nu)
    # The log of a part is of all files and values: it is called by what the names of their results share.
    logs=$(basename "$output" .json | sed -E 's/\{[a-z]+\}//g; s/_+/_/g; s/^_|_$//g')
    in_pool ask_part "$parts/${logs:-answers}." "${numbers[@]}"
    later "$output" || join_answers
}
ask() { # OUTPUT REMAIN FILE...
    # shellcheck disable=SC2086  # ENGINE_FLAGS and the values are lists
    python "$script" "${PROMPT_FLAGS[@]}" --template "$TEMPLATE" --llm-model "$model" --input-json "${@:3}" --output-json "$1" \
        --remain-output-json "$2" "${flags[@]}" ${ENGINE_FLAGS:-} "--$choice" $values
}
ask_part() { # PART: of every file that has such a part
    local file files=()
    for file in "${divided[@]}"; do
        file=$parts/in/$1/$(stem "$file").json
        [[ ! -e $file ]] || files+=("$file")
    done
    ask "$parts/$(basename "$output" .json).$1.json" "$parts/$(basename "$output" .json)_remain.$1.json" "${files[@]}"
}
join_answers() {
    local file value result
    for file in "${divided[@]}"; do
        for value in $values; do
            result=$(result_of "$file" "$value")
            python aggregate.py --questions "$file" --splits_dir "$parts/split/$(stem "$file")" --output_file "$result" \
                --input_files "$parts/$(basename "$result" .json).[0-9]*.json"
        done
    done
}
result_of() { # FILE VALUE: the path that SCRIPT writes
    local path=${output//\{input\}/$(stem "$1")}
    echo "${path//\{$choice\}/${2//:/}}"
}
# parts_of_answers FILE: one if some of its results were begun as a whole, and none in parts; else as parts_of says.
parts_of_answers() {
    local value result
    for value in $values; do
        result=$(result_of "$1" "$value")
        ! begun "$result" || compgen -G "$parts/$(basename "$result" .json).[0-9]*.manifest.json" >/dev/null || { echo 1; return; }
    done
    parts_of "" "$parts/split/$(stem "$1")"
}

# newest_model: the folder of the DPO model where there is one, else of the SFT model.
newest_model() { if [[ -f $MODEL_DIR/dpo/config.json ]]; then echo "$MODEL_DIR/dpo"; else echo "$MODEL_DIR/sft"; fi; }

# version_of MODEL: the file by which a model that was trained again is told from the one before; none for a hub's name.
version_of() {
    local file
    for file in trainer_state.json config.json; do  # the first is of a model that LLaMA-Factory trained
        [[ ! -f $1/$file ]] || { echo "$1/$file"; return; }
    done
}

# ---- Training

# setting KEY RECIPE KEY=VALUE...: the value that LLaMA-Factory takes: the last KEY=VALUE, else the recipe's; empty for null.
setting() {
    local key=$1 word value
    value=$(sed -nE "s/^$key: *([^ #]*).*/\1/p" "$2")
    shift 2
    for word in "$@"; do [[ $word != "$key="* ]] || value=${word#*=}; done
    [[ $value == @(null|"~") ]] || echo "${value//[\"\']/}"
}

# fit_to RECIPE TOKENIZER KEY=VALUE...: in FIT_FLAGS, the flags by which rows are fitted into what RECIPE will train.
fit_to() {
    local recipe=recipes/$MODEL/$1.yaml length
    recipe_exists "$recipe"
    length=$(setting cutoff_len "$recipe" "${@:3}")
    FIT_FLAGS=(--train_recipe "$recipe" --tokenizer "$2" --template "$TEMPLATE")
    [[ -z $length ]] || FIT_FLAGS+=(--cutoff_len "$length")
}

recipe_exists() { # RECIPE
    [[ -f $1 ]] || refuse "$1: no such recipe; give one of recipes/$MODEL as SFT_RECIPE or DPO_RECIPE"
}

# layout RECIPE KEY=VALUE...: how a training run starts on this machine, in the variables below. A recipe with DeepSpeed takes
# all GPUs, any other one GPU, unless TRAIN_GPUS says otherwise. The total batch stays the recipe's "# total_batch: N" on any
# number of GPUs and machines (NNODES), by the number of steps accumulated.
layout() {
    local recipe=$1 wanted
    recipe_exists "$recipe"
    DEEPSPEED=$(setting deepspeed "$@")
    wanted=${TRAIN_GPUS:-$([[ -n $DEEPSPEED ]] && echo all || echo 1)}
    [[ $wanted == all || $wanted =~ ^[1-9][0-9]*$ ]] || refuse "TRAIN_GPUS=$wanted: expected a number of GPUs, or all"
    [[ $wanted == all || $wanted -le ${#GPUS[@]} || -z ${TRAIN_GPUS:-} ]] || refuse "TRAIN_GPUS=$wanted: more than the GPUs to use (${#GPUS[@]}); lower it or use more"
    [[ -z $DEEPSPEED || ${#GPUS[@]} -gt 0 ]] || refuse "$recipe: DeepSpeed needs a GPU, and there is none to use; take a machine with GPUs," \
        "or a recipe that has no deepspeed key"
    TRAIN_ON=("${GPUS[@]}")
    [[ $wanted == all ]] || TRAIN_ON=("${GPUS[@]:0:wanted}")
    PROCESSES=${NPROC_PER_NODE:-$((${#TRAIN_ON[@]} ? ${#TRAIN_ON[@]} : 1))}
    PROCESSES=$((PROCESSES * ${NNODES:-1}))
    # Without this LLaMA-Factory starts DeepSpeed on one GPU, and a machine of several with one GPU each, not at all.
    TORCHRUN=$([[ -n $DEEPSPEED || $PROCESSES -gt 1 ]] && echo 1 || echo 0)
    PER_DEVICE=$(setting per_device_train_batch_size "$@")
    PER_DEVICE=${PER_DEVICE:-8}  # the trainer's own value
    ACCUMULATION=$(setting gradient_accumulation_steps "$@")
    TOTAL_BATCH=$(sed -nE 's/^# total_batch: *([0-9]+).*/\1/p' "$recipe")
    if [[ -n $TOTAL_BATCH && " ${*:2}" != *" gradient_accumulation_steps="* ]]; then
        ((TOTAL_BATCH % (PER_DEVICE * PROCESSES) == 0)) || \
            refuse "$recipe: its total batch of $TOTAL_BATCH cannot be divided among $PROCESSES processes with $PER_DEVICE per device;" \
                "set TRAIN_GPUS to a number that divides it, or give per_device_train_batch_size= or gradient_accumulation_steps= after the recipe (SFT_FLAGS, DPO_FLAGS)"
        ACCUMULATION=$((TOTAL_BATCH / (PER_DEVICE * PROCESSES)))
    fi
    ACCUMULATION=${ACCUMULATION:-1}
    TOTAL_BATCH=$((PER_DEVICE * ACCUMULATION * PROCESSES))
}

# hold LOCK FOLDER: end here if another process trains into FOLDER; else this one holds LOCK until it and what it starts have ended.
hold() {
    local status=0
    exec 9>>"$1"
    flock --nonblock --conflict-exit-code 75 9 || status=$?
    case $status in
        0) echo "process $$ of $HOSTNAME" >"$1" ;;
        75) refuse "$2: $(cat "$1") is training it; wait for it or end it" ;;
        *) echo "warning: $1: cannot be locked here; see to it that no other machine trains $2 at the same time" >&2 ;;
    esac
}

# trainer COMMAND ARGUMENT...: LLaMA-Factory in its own environment, whose torchrun it starts by name. It tokenises in processes of
# its own, which must not each use all cores as well.
trainer() {
    PATH="$(cd "$(dirname "$LLAMAFACTORY")" && pwd):$PATH" DISABLE_VERSION_CHECK=1 TOKENIZERS_PARALLELISM=false "$LLAMAFACTORY" "$@"
}

# train STAGE RECIPE DATA... -- KEY=VALUE...: one LLaMA-Factory run of recipes/$MODEL/RECIPE.yaml on files of this run. An
# interrupted one continues from its last checkpoint, unless its data has changed; trained_on.sha256 marks completion. Adapters
# (LoRA) are trained in the folder's adapter/ and merged, so that every model is an ordinary checkpoint.
# On several machines (NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT), that of NODE_RANK 0 keeps the books.
train() { (train_alone "$@"); }  # in a subshell, whose end gives the lock back
train_alone() {
    local folder=$MODEL_DIR/$1 recipe=recipes/$MODEL/$2.yaml data=() rank=${NODE_RANK:-0} output=$MODEL_DIR/$1 adapters=0 sums
    shift 2
    while [[ $1 != -- ]]; do data+=("$1"); shift; done
    shift
    recipe_exists "$recipe"
    local begun=$folder/training_on.sha256 finished=$folder/trained_on.sha256 settings=$folder/settings.txt processes=$folder/processes.txt
    mkdir -p "$MODEL_DIR"
    hold "$folder.$rank.lock" "$folder"
    for sums in "$begun" "$finished"; do
        if ((rank == 0)) && [[ -f $sums ]] && ! { sha256sum --check --status "$sums" && [[ "$recipe $*" == "$(cat "$settings")" ]]; }; then
            refuse "$folder was trained on other data or with other settings; move it away to train it again"
        fi
    done
    [[ -f $finished ]] && { echo "$folder is trained already" >&2; return; }
    layout "$recipe" "$@"
    [[ -x $LLAMAFACTORY ]] || refuse "$LLAMAFACTORY is missing; make it with: bash scripts/setup.sh"
    # Without these every machine would wait at an address and a port of its own.
    ((${NNODES:-1} == 1)) || [[ -n ${MASTER_ADDR:-} && -n ${MASTER_PORT:-} && -n ${NODE_RANK:-} ]] || \
        refuse "NNODES=$NNODES needs NODE_RANK (from 0), and MASTER_ADDR and MASTER_PORT of the machine with NODE_RANK=0"
    [[ $(setting finetuning_type "$recipe" "$@") != lora ]] || adapters=1 output=$folder/adapter
    if [[ -n $DEEPSPEED && -f $processes && $(cat "$processes") != "$PROCESSES" ]] && compgen -G "$output/checkpoint-*" >/dev/null; then
        refuse "$output: its checkpoint was written by $(cat "$processes") processes and cannot be loaded by $PROCESSES (DeepSpeed ZeRO-3);" \
            "continue on as many GPUs, or remove $output/checkpoint-* to begin again"
    fi
    mkdir -p "$WORK/recipes" "$output"
    cmp -s recipes/dataset_info.json "$WORK/recipes/dataset_info.json" || cp recipes/dataset_info.json "$WORK/recipes/"
    if ((rank == 0)); then
        echo "$recipe $*" >"$settings"
        echo "$PROCESSES" >"$processes"
        sha256sum "$recipe" "${data[@]}" >"$begun"
    fi
    if [[ ! -f $output/trained ]]; then start_training "$@"; fi  # else it was interrupted while its adapters were being merged
    ((rank == 0)) || return 0
    if ((adapters)); then
        touch "$output/trained"
        merge "$@"
    fi
    mv "$begun" "$finished"
    rm -rf "$output"/checkpoint-*
}

# start_training KEY=VALUE...: what train() runs in the trainer's environment, with the layout found before.
start_training() (
    local words=() name
    if ((${#GPUS[@]})); then
        CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${TRAIN_ON[*]}")
        export CUDA_VISIBLE_DEVICES
        [[ $(setting use_cpu "$recipe") != true ]] || words+=(use_cpu=false flash_attn=auto)  # the small model's recipes are a CPU's
    else
        # Training spends a fifth of its time on memory that is given back to the system and asked for again: it is kept,
        # in huge pages.
        export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=68719476736}
    fi
    ((TORCHRUN == 0)) || export FORCE_TORCHRUN=1
    for name in NNODES NODE_RANK MASTER_ADDR MASTER_PORT NPROC_PER_NODE; do [[ -z ${!name:-} ]] || export "${name?}"; done
    words+=(gradient_accumulation_steps="$ACCUMULATION")
    echo "training $folder: $PER_DEVICE per device x $ACCUMULATION accumulated x $PROCESSES processes = $TOTAL_BATCH per step," \
        "on ${TRAIN_ON[*]:-the CPU}" >&2
    trainer train "$recipe" dataset_dir="$WORK/recipes" output_dir="$output" "${words[@]}" "$@"
)

# merge KEY=VALUE...: the adapters in $output put into the model they were trained on, in $folder; on the CPU, in its memory.
merge() {
    local file
    CUDA_VISIBLE_DEVICES="" trainer export --model_name_or_path "$(setting model_name_or_path "$recipe" "$@")" --adapter_name_or_path "$output" \
        --template "$(setting template "$recipe" "$@")" --finetuning_type lora --export_dir "$folder" --export_device cpu
    for file in trainer_state.json trainer_log.jsonl; do  # by which the next stage and the report know the training
        [[ ! -f $output/$file ]] || cp "$output/$file" "$folder/"
    done
}
