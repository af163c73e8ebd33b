# shellcheck shell=bash
# Training with LLaMA-Factory: recipes, the layout on this machine, and runs that continue. common.sh sources this file.

LLAMAFACTORY=${LLAMAFACTORY:-.venv-train/bin/llamafactory-cli}
# Machines that train together wait so long for each other: when they begin, and when one of them falls silent.
NODE_SECONDS=${NODE_SECONDS:-600}

# version_of MODEL: print a file of MODEL that changes whenever the model is trained again; nothing if MODEL is a name on a hub.
version_of() {
    local file
    for file in trainer_state.json config.json; do  # LLaMA-Factory writes the first
        [[ ! -f $1/$file ]] || { echo "$1/$file"; return; }
    done
}

# setting KEY RECIPE KEY=VALUE...: print the value that LLaMA-Factory uses: the last KEY=VALUE, otherwise the recipe's. Null is empty.
setting() {
    local key=$1 word value
    value=$(sed -nE "s/^$key: *([^ #]*).*/\1/p" "$2")
    shift 2
    for word in "$@"; do [[ $word != "$key="* ]] || value=${word#*=}; done
    [[ $value == @(null|"~") ]] || echo "${value//[\"\']/}"
}

# fit_to RECIPE TOKENIZER KEY=VALUE...: set FIT_FLAGS to the flags that fit training rows into the token limit of RECIPE.
fit_to() {
    local recipe=recipes/$MODEL/$1.yaml length
    recipe_exists "$recipe"
    length=$(setting cutoff_len "$recipe" "${@:3}")
    FIT_FLAGS=(--train_recipe "$recipe" --tokenizer "$2" --template "$TEMPLATE")
    [[ -z $length ]] || FIT_FLAGS+=(--cutoff_len "$length")
}

recipe_exists() { # RECIPE
    [[ -f $1 ]] || refuse "$1: this recipe does not exist; set SFT_RECIPE or DPO_RECIPE to one of recipes/$MODEL"
}

# layout RECIPE KEY=VALUE...: set the variables below to the processes and batch sizes of a training run on this machine. A recipe
# with DeepSpeed uses all GPUs, any other recipe one GPU, unless TRAIN_GPUS is set. The total batch is the recipe's "# total_batch: N"
# on any number of GPUs and machines (NNODES): the number of accumulated steps is adjusted.
layout() {
    local recipe=$1 wanted
    recipe_exists "$recipe"
    DEEPSPEED=$(setting deepspeed "$@")
    wanted=${TRAIN_GPUS:-$([[ -n $DEEPSPEED ]] && echo all || echo 1)}
    [[ $wanted == all || $wanted =~ ^[1-9][0-9]*$ ]] || refuse "TRAIN_GPUS=$wanted: not a number of GPUs; give a number or all"
    [[ $wanted == all || $wanted -le ${#GPUS[@]} || -z ${TRAIN_GPUS:-} ]] || refuse "TRAIN_GPUS=$wanted: only ${#GPUS[@]} GPUs can be used; give at most ${#GPUS[@]}, or use more GPUs"
    [[ -z $DEEPSPEED || ${#GPUS[@]} -gt 0 ]] || refuse "$recipe: DeepSpeed needs a GPU, and no GPU can be used; use a machine with GPUs," \
        "or a recipe without the key deepspeed"
    TRAIN_ON=("${GPUS[@]}")
    [[ $wanted == all ]] || TRAIN_ON=("${GPUS[@]:0:wanted}")
    PROCESSES=${NPROC_PER_NODE:-$((${#TRAIN_ON[@]} ? ${#TRAIN_ON[@]} : 1))}
    PROCESSES=$((PROCESSES * ${NNODES:-1}))
    # Without this, LLaMA-Factory fails to start DeepSpeed on one GPU, and a run on several machines with one GPU each.
    TORCHRUN=$([[ -n $DEEPSPEED || $PROCESSES -gt 1 ]] && echo 1 || echo 0)
    PER_DEVICE=$(setting per_device_train_batch_size "$@")
    PER_DEVICE=${PER_DEVICE:-8}  # the trainer's default
    ACCUMULATION=$(setting gradient_accumulation_steps "$@")
    TOTAL_BATCH=$(sed -nE 's/^# total_batch: *([0-9]+).*/\1/p' "$recipe")
    if [[ -n $TOTAL_BATCH && " ${*:2}" != *" gradient_accumulation_steps="* ]]; then
        ((TOTAL_BATCH % (PER_DEVICE * PROCESSES) == 0)) || \
            refuse "$recipe: its total batch of $TOTAL_BATCH cannot be divided among $PROCESSES processes with $PER_DEVICE per device;" \
                "set TRAIN_GPUS to a number that divides it, or set per_device_train_batch_size= or gradient_accumulation_steps= in SFT_FLAGS or DPO_FLAGS"
        ACCUMULATION=$((TOTAL_BATCH / (PER_DEVICE * PROCESSES)))
    fi
    ACCUMULATION=${ACCUMULATION:-1}
    TOTAL_BATCH=$((PER_DEVICE * ACCUMULATION * PROCESSES))
}

# tracking FOLDER: in TRACKING, the words by which the training of FOLDER is reported to REPORT_TO; end here if the trainer cannot.
# Nothing leaves this machine, unless the variables that are set here were set before.
tracking() {
    local python run logs
    TRACKING=()
    [[ $REPORT_TO != none ]] || return 0
    python=$(dirname "$LLAMAFACTORY")/python
    [[ -x $python ]] || python=python
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)" "$REPORT_TO" || \
        refuse "REPORT_TO=$REPORT_TO: the trainer's environment lacks the package $REPORT_TO; install it with: $python -m pip install $REPORT_TO"
    run=${MODEL}_$(basename "$1")
    # shellcheck disable=SC2153  # common.sh sets it
    mkdir -p "$TRACKING_DIR"
    logs=$(realpath "$TRACKING_DIR")
    export WANDB_MODE=${WANDB_MODE:-offline} WANDB_DIR=${WANDB_DIR:-$logs} WANDB_PROJECT=${WANDB_PROJECT:-dynamicrag}
    export TENSORBOARD_LOGGING_DIR=${TENSORBOARD_LOGGING_DIR:-$logs/$run} TRACKIO_DIR=${TRACKIO_DIR:-$logs/trackio}
    export MLFLOW_TRACKING_URI=${MLFLOW_TRACKING_URI:-sqlite:///$logs/mlflow.db} MLFLOW_EXPERIMENT_NAME=${MLFLOW_EXPERIMENT_NAME:-dynamicrag}
    TRACKING=(report_to="$REPORT_TO" run_name="$run" project=dynamicrag)
}

# hold LOCK FOLDER: lock FOLDER until file 9 is closed, or until this process and all that it starts have ended. Exits with an error if
# another process trains it, or if nothing can be locked: two machines must not train one folder. The programs of a killed training hold
# the lock while the kernel frees their memory: hold waits for them, for ENDING_SECONDS (30).
hold() {
    local status=0 holder="" ended=0
    exec 9>>"$1"
    flock --nonblock --conflict-exit-code 75 9 2>/dev/null || status=$?
    if ((status == 75)); then
        read -r holder <"$1" || true
        [[ ! $holder =~ ^process\ ([0-9]+)\ of\ $HOSTNAME, ]] || kill -0 "${BASH_REMATCH[1]}" 2>/dev/null || ended=1
        ((!ended)) || { status=0; flock --timeout "${ENDING_SECONDS:-30}" --conflict-exit-code 75 9 || status=$?; }
    fi
    case $status in
        0) echo "process $$ of $HOSTNAME, since $(date "+%F %T")," >"$1" ;;
        75)
            ((!ended)) || refuse "$2: $holder has ended, but a program that it started has not; end that program (fuser $1)"
            refuse "$2: $holder is training it; wait until that process has ended, or end it (the locks of a lost machine end when its file" \
                "server notices that)" ;;
        127) refuse "flock: this command does not exist, and two runs could train $2 at the same time without it; install util-linux" ;;
        *) refuse "$1: its file system has no locks (flock), and two runs could train $2 at the same time without them; use one that has, or" \
            "mount it with them (Lustre: -o flock)" ;;
    esac
}

# trainer COMMAND ARGUMENT...: run a command of LLaMA-Factory's environment until it ends, or until this process does. If this process
# is asked to stop, it stops the command first; if it is killed, the kernel stops the command (setpriv). PATH is set because programs
# start others by name. LLaMA-Factory tokenises in several processes, which must not each use all cores.
trainer() {
    local pid status=0 bound=()
    ! setpriv --pdeathsig TERM true 2>/dev/null || bound=(setpriv --pdeathsig TERM)
    PATH="$(cd "$(dirname "$LLAMAFACTORY")" && pwd):$PATH" DISABLE_VERSION_CHECK=1 TOKENIZERS_PARALLELISM=false "${bound[@]}" "$@" </dev/null &
    pid=$!
    trap 'end_trainer 130' INT  # Ctrl-C does not reach the background jobs of a shell
    trap 'end_trainer 143' TERM HUP
    wait "$pid" || status=$?
    trap - INT TERM HUP
    return "$status"
}
end_trainer() { # STATUS
    trap '' INT TERM HUP
    kill "$pid" 2>/dev/null || true
    wait "$pid" || true
    echo "interrupted; run the same command again to continue from the last checkpoint" >&2
    exit "$1"
}

# train STAGE RECIPE DATA... -- KEY=VALUE...: train $MODEL_DIR/STAGE with recipes/$MODEL/RECIPE.yaml on the DATA files. An interrupted
# run continues from its last checkpoint, unless its data has changed. trained_on.sha256 marks a finished model. Adapters (LoRA) are
# trained in the folder adapter/ and merged, so that every model is an ordinary checkpoint. On several machines (NNODES, NODE_RANK,
# MASTER_ADDR, MASTER_PORT), the machine with NODE_RANK 0 writes the records, and the others compare their data and settings with them.
# If the training fails, it is started again MAX_RESTARTS times (0).
train() {
    train_held "$@"
    exec 9>&-  # the lock ends with the training
}
train_held() {
    local folder=$MODEL_DIR/$1 recipe=recipes/$MODEL/$2.yaml data=() rank=${NODE_RANK:-0} output=$MODEL_DIR/$1 adapters=0
    shift 2
    while [[ $1 != -- ]]; do data+=("$1"); shift; done
    shift
    recipe_exists "$recipe"
    several_machines
    local started=$folder/training_on.sha256 finished=$folder/trained_on.sha256 settings=$folder/settings.txt processes=$folder/processes.txt
    mkdir -p "$MODEL_DIR"
    hold "$folder.$rank.lock" "$folder"
    ((rank == 0)) || await_records
    same_as_recorded "$recipe $*"
    [[ -f $finished ]] && { echo "$folder: already trained" >&2; return; }
    layout "$recipe" "$@"
    [[ -x $LLAMAFACTORY ]] || refuse "$LLAMAFACTORY: does not exist; make it with: bash scripts/setup.sh"
    [[ $(setting finetuning_type "$recipe" "$@") != lora ]] || adapters=1 output=$folder/adapter
    if [[ -n $DEEPSPEED && -f $processes && $(cat "$processes") != "$PROCESSES" ]] && compgen -G "$output/checkpoint-*" >/dev/null; then
        refuse "$output: $(cat "$processes") processes wrote its checkpoint, which $PROCESSES processes cannot load (DeepSpeed ZeRO-3);" \
            "use the same number of GPUs, or remove $output/checkpoint-* to train from the start"
    fi
    tracking "$folder"
    if ((rank == 0)); then
        mkdir -p "$WORK/recipes" "$output"
        cmp -s recipes/dataset_info.json "$WORK/recipes/dataset_info.json" || cp recipes/dataset_info.json "$WORK/recipes/"
        echo "$recipe $*" >"$settings"
        echo "$PROCESSES" >"$processes"
        sha256sum "$recipe" "${data[@]}" >"$started.writing"
        mv "$started.writing" "$started"  # the other machines begin when they see it
    fi
    if [[ ! -f $output/trained ]]; then train_until_done "$@"; fi  # otherwise only the merge of its adapters is missing
    ((rank == 0)) || return 0
    if ((adapters)); then
        touch "$output/trained"
        merge "$@"
    fi
    mv "$started" "$finished"
    rm -rf "$output"/checkpoint-*
}

# several_machines: exit with an error if a variable of a training on several machines is missing, or is none of ours.
several_machines() {
    local name
    for name in RDZV_ID MIN_NNODES MAX_NNODES; do
        [[ -z ${!name:-} ]] || refuse "$name=${!name}: the number of machines is fixed, because it decides the batch; unset $name, and set MAX_RESTARTS" \
            "to start a failed training again"
    done
    for name in NNODES=${NNODES:-1} NODE_SECONDS=$NODE_SECONDS MAX_RESTARTS=${MAX_RESTARTS:-0}; do
        [[ $name =~ =(0|[1-9][0-9]*)$ && $name != @(NNODES|NODE_SECONDS)=0 ]] || refuse "$name: not a number; give one"
    done
    ((${NNODES:-1} > 1)) || { ((rank == 0)) || refuse "NODE_RANK=$rank: NNODES is not set; set it to the number of machines"; return 0; }
    # Without these, every machine would wait at a different address and port.
    [[ -n ${MASTER_ADDR:-} && -n ${MASTER_PORT:-} && -n ${NODE_RANK:-} ]] || \
        refuse "NNODES=$NNODES: NODE_RANK, MASTER_ADDR or MASTER_PORT is not set; set NODE_RANK (from 0), and the other two to the address and" \
        "the port of the machine with NODE_RANK=0"
    [[ $rank =~ ^(0|[1-9][0-9]*)$ && $rank -lt $NNODES ]] || refuse "NODE_RANK=$rank: with NNODES=$NNODES the machines are 0 to $((NNODES - 1))"
}

# await_records: wait until machine 0 has written the records of this training.
await_records() {
    local waited
    for ((waited = 0; waited < NODE_SECONDS; waited++)); do
        [[ ! -f $started && ! -f $finished ]] || return 0
        ((waited % 60)) || echo "$folder: machine $rank waits for machine 0, at most $((NODE_SECONDS - waited)) more seconds" >&2
        sleep 1
    done
    refuse "$folder: machine 0 has not begun its training in NODE_SECONDS=$NODE_SECONDS; start the same script there with NODE_RANK=0, on a file system" \
        "that all machines share"
}

# same_as_recorded SETTINGS: exit with an error if the data or the settings are not those of the training that was begun or finished in
# $folder. On machine 0 an earlier run wrote the records, on the others machine 0 did.
same_as_recorded() {
    local sums
    for sums in "$started" "$finished"; do
        [[ -f $sums ]] || continue
        if [[ $1 == "$(cat "$settings")" ]]; then
            if ((rank == 0)); then
                sha256sum --check --status "$sums" && continue
            else
                [[ $(sha256sum "$recipe" "${data[@]}") != "$(cat "$sums" 2>/dev/null || cat "$finished")" ]] || continue
            fi
        fi
        ((rank == 0)) || refuse "$folder: machine 0 trains it with other data or settings than machine $rank on $HOSTNAME; give both machines the same" \
            "files, recipes, settings file and variables"
        refuse "$folder: trained on other data or with other settings; move the folder away to train again"
    done
}

# train_until_done KEY=VALUE...: run the training, and start it again MAX_RESTARTS times if it fails, from its last checkpoint.
train_until_done() {
    local restarts=0 status checkpoint where="" everywhere=""
    ((${NNODES:-1} == 1)) || where=" on $HOSTNAME, machine $rank of $NNODES" everywhere=" on every machine"
    while true; do
        status=0
        ((rank > 0)) || drop_torn_checkpoints
        start_training "$@" || status=$?
        ((status)) || return 0
        checkpoint=$(find "$output" -maxdepth 1 -name "checkpoint-*" | sort -V | tail -n 1)
        ((restarts++ < ${MAX_RESTARTS:-0})) || break
        echo "$folder: the training ended with status $status; restart $restarts of $MAX_RESTARTS, from ${checkpoint:-the beginning}" >&2
    done
    echo "error: $folder: the training ended with status $status$where; see the messages above, then run the same command again$everywhere," \
        "to continue from ${checkpoint:-the beginning}" >&2
    exit "$status"
}

# drop_torn_checkpoints: remove the checkpoints of $output whose writing was interrupted. The trainer writes trainer_state.json last.
drop_torn_checkpoints() {
    local checkpoint
    for checkpoint in "$output"/checkpoint-*; do
        [[ ! -d $checkpoint || $(tail -c 2 "$checkpoint/trainer_state.json" 2>/dev/null) == "}" ]] || rm -rf "$checkpoint"
    done
}

# start_training KEY=VALUE...: run the training of train() with the variables that layout() has set.
start_training() {
    local words=() command=("$LLAMAFACTORY" train) nodes=${NNODES:-1} python
    if ((${#GPUS[@]})); then
        local -x CUDA_VISIBLE_DEVICES
        CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${TRAIN_ON[*]}")
        [[ $(setting use_cpu "$recipe") != true ]] || words+=(use_cpu=false flash_attn=auto)  # the recipes of the small model are for a CPU
        # LLaMA-Factory sets both for the processes that it starts itself.
        local -x PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True} TORCH_NCCL_AVOID_RECORD_STREAMS=${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}
    else
        # Returning memory to the system and requesting it again takes a fifth of the training time. These settings keep freed blocks of
        # up to 256 MiB, in huge pages. Larger blocks have another size for every row, and would leave gaps (benchmarks/training.py).
        local -x GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=268435456:glibc.malloc.trim_threshold=68719476736}
    fi
    if ((TORCHRUN)); then
        command=("$(dirname "$LLAMAFACTORY")/torchrun" --nnodes "$nodes" --nproc-per-node $((PROCESSES / nodes)))
        if ((nodes > 1)); then
            command+=(--node-rank "$rank" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --rdzv-conf "timeout=$NODE_SECONDS")
        else
            command+=(--standalone --local-addr 127.0.0.1)
        fi
        command+=(scripts/train_process.py --seconds "$NODE_SECONDS")
    fi
    words=("$recipe" dataset_dir="$WORK/recipes" output_dir="$output" "${words[@]}" gradient_accumulation_steps="$ACCUMULATION" "${TRACKING[@]}" "$@")
    echo "training $folder: $PER_DEVICE per device x $ACCUMULATION accumulated x $PROCESSES processes = $TOTAL_BATCH per step," \
        "on ${TRAIN_ON[*]:-the CPU}" >&2
    if ((nodes > 1)); then
        echo "machine $rank of $nodes waits for the others at $MASTER_ADDR:$MASTER_PORT, at most NODE_SECONDS=$NODE_SECONDS" >&2
        python=$(dirname "$LLAMAFACTORY")/python
        [[ -x $python ]] || python=python
        trainer "$python" scripts/meet.py --node "$rank" --nodes "$nodes" --address "$MASTER_ADDR" --port "$MASTER_PORT" --seconds "$NODE_SECONDS" \
            --folder "$output" "${words[@]}" processes="$PROCESSES" >"$folder.$rank.checkpoint" || exit
        words+=(resume_from_checkpoint="$(cat "$folder.$rank.checkpoint")")
        rm "$folder.$rank.checkpoint"
        [[ ${words[-1]} != *= ]] || unset "words[-1]"
    fi
    trainer "${command[@]}" "${words[@]}"
}

# merge KEY=VALUE...: merge the adapters of $output into the model that they adapt, and write it to $folder. It runs on the CPU.
merge() {
    local file
    CUDA_VISIBLE_DEVICES="" trainer "$LLAMAFACTORY" export --model_name_or_path "$(setting model_name_or_path "$recipe" "$@")" --adapter_name_or_path "$output" \
        --template "$(setting template "$recipe" "$@")" --finetuning_type lora --export_dir "$folder" --export_device cpu
    for file in trainer_state.json trainer_log.jsonl; do  # the next stage and the report read the training from these
        [[ ! -f $output/$file ]] || cp "$output/$file" "$folder/"
    done
}
