# shellcheck shell=bash
# Training with LLaMA-Factory: recipes, the layout on this machine, and runs that continue; sourced by common.sh.

LLAMAFACTORY=${LLAMAFACTORY:-.venv-train/bin/llamafactory-cli}

# version_of MODEL: the file by which a model that was trained again is told from the one before; none for a hub's name.
version_of() {
    local file
    for file in trainer_state.json config.json; do  # the first is of a model that LLaMA-Factory trained
        [[ ! -f $1/$file ]] || { echo "$1/$file"; return; }
    done
}

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
