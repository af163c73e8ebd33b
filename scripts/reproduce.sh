#!/usr/bin/env bash
# A published experiment by one command. It begins with a forecast, and continues after an interruption:
#     bash scripts/reproduce.sh nq [configs/llama3_8b.env] [--dry_run]       an evaluation set, several, or all nine, to their table
#     bash scripts/reproduce.sh train [configs/llama3_8b.env] [--dry_run]    the published training data, to a trained model
# --dry_run stops after the forecast (scripts/forecast.py, whose flags FORECAST_FLAGS gives). The files are those of
# prepare_data.py, in PREPARED. RELEASED=models/DynamicRAG-8B answers with a released checkpoint, as configs/released_8b.env
# says; without it the newest model of the settings answers.
set -euo pipefail
NINE="nq triviaqa popqa hotpotqa 2wikimqa fever eli5 asqa arc_challenge"
usage() { # [WORD]: which is neither a set nor a flag
    echo "error: ${1:+$1: is no set, settings file (*.env) or flag; }usage: bash scripts/reproduce.sh SET...|all|train [SETTINGS.env] [--dry_run]; the sets are $NINE" >&2
    exit 2
}
ASKED="" DRY_RUN="" SETTINGS=()
for word; do
    case $word in
        --dry_run | --dry-run) DRY_RUN=1 ;;
        *.env) SETTINGS+=("$word") ;;
        all) ASKED+=" $NINE" ;;
        *) [[ $word == train || " $NINE " == *" $word "* ]] || usage "$word"; ASKED+=" $word" ;;
    esac
done
[[ -n $ASKED && (" $ASKED " != *" train "* || $ASKED == " train") && ${#SETTINGS[@]} -le 1 ]] || usage
PREPARED=${PREPARED:-data/prepared}
EVAL_QUESTIONS="" EVAL_FILES=""
for name in $(tr ' ' '\n' <<<"$ASKED" | awk 'NF && !seen[$0]++'); do EVAL_FILES+=" $PREPARED/dynamicrag_$name.jsonl"; done
FILES=$EVAL_FILES  # to be forecast
[[ $ASKED != " train" ]] || EVAL_FILES=""
export EVAL_QUESTIONS EVAL_FILES SELECTORS="${SELECTORS:-none top:5 dynamic}"
[[ $ASKED != " train" ]] || FILES=" $PREPARED/dynamicrag_training.jsonl"
GIVEN=$EVAL_FILES
set -- "${SETTINGS[@]}"
source "$(dirname "$0")/common.sh"
[[ "$EVAL_QUESTIONS|$EVAL_FILES" == "|$GIVEN" ]] || \
    refuse "$CONFIG sets EVAL_QUESTIONS or EVAL_FILES over the environment; write EVAL_QUESTIONS=\${EVAL_QUESTIONS-...} and EVAL_FILES=\${EVAL_FILES:-...}"

prepared() { # end here if a file is missing, naming the command that makes all that are; warn of files with the first rows only
    local file missing=() limited=()
    for file in $FILES; do [[ -f $file ]] || missing+=("$(stem "$file")"); done
    ((${#missing[@]} == 0)) || refuse "$PREPARED/${missing[0]}.jsonl is missing; make it with: python prepare_data.py --name ${missing[*]}"
    for file in $FILES; do [[ -z $(made_with limit "$file.manifest.json") ]] || limited+=("$(stem "$file")"); done
    ((${#limited[@]} == 0)) || echo "warning: ${limited[*]}: only the first rows were prepared (--limit); results are not those of whole sets" >&2
}
forecast() { # EXPERIMENT FLAG... -- FLAG...
    # shellcheck disable=SC2086  # FORECAST_FLAGS is a list of flags
    PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" python scripts/forecast.py "$1" --gpus "${#GPUS[@]}" --parts "$NUM_SHARDS" \
        --disk "$WORK" ${FORECAST_FLAGS:-} "${@:2}"
}
place() { # FILE NAME: the prepared FILE is read as NAME by the numbered scripts
    [[ ! -e $2 || $2 -ef $1 ]] || refuse "$2 is there, and is not $1; move it away, or set WORK to another folder"
    mkdir -p "$(dirname "$2")" 2>/dev/null || refuse "$(dirname "$2"): the folder cannot be made; set WORK to a folder that you may write"
    ln -sfn "$(realpath "$1")" "$2"
}

train_from_prepared() {
    local file=${FILES# } sft=recipes/$MODEL/$SFT_RECIPE.yaml dpo=recipes/$MODEL/$DPO_RECIPE.yaml flags=() length script
    recipe_exists "$sft"
    recipe_exists "$dpo"
    [[ -z $SHARDS ]] || refuse "SHARDS=\"$SHARDS\": the training data runs on one machine; unset it, or run the numbered scripts"
    # shellcheck disable=SC2086  # the *_FLAGS are lists
    {
        length=$(setting cutoff_len "$sft" ${SFT_FLAGS:-})
        flags+=(--sft_epochs "$(setting num_train_epochs "$sft" ${SFT_FLAGS:-})" --dpo_epochs "$(setting num_train_epochs "$dpo" ${DPO_FLAGS:-})")
        [[ $(setting finetuning_type "$sft" ${SFT_FLAGS:-}) != lora ]] || flags+=(--sft_adapters)
        [[ $(setting finetuning_type "$dpo" ${DPO_FLAGS:-}) != lora ]] || flags+=(--dpo_adapters)
        [[ $(setting pref_loss "$dpo" ${DPO_FLAGS:-}) != @(simpo|orpo) ]] || flags+=(--no_reference)
        forecast train "${flags[@]}" ${length:+--cutoff_len "$length"} --expert_flags="${EXPERT_FLAGS:-}" --split_flags="${SPLIT_FLAGS:-}" \
            --pair_flags="${PAIR_FLAGS:-}" -- "${PROMPT_FLAGS[@]}" --template "$TEMPLATE" --llm-model "$BASE_MODEL" --input-jsonl "$file" \
            --topn "$N_DOCS_SHOWN" ${ENGINE_FLAGS:-} ${SAMPLE_FLAGS:-}
    }
    [[ -z $DRY_RUN ]] || return 0
    if grep -q '"rerank_label"' <(head -n 1 "$file"); then
        place "$file" "$WORK/output/retrieval_data_rerank.jsonl"
    else
        place "$file" "$WORK/output/retrieval_data.jsonl"
        bash scripts/03_rerank.sh "$CONFIG"
    fi
    for script in 04_training_data 05_sft 06_sample 07_reward 08_dpo; do bash "scripts/$script.sh" "$CONFIG"; done
    echo "the trained model is $(newest_model); evaluate it with: bash scripts/reproduce.sh all $CONFIG" >&2
}

answer_prepared() {
    local model=${RELEASED:-$(newest_model)} rerank=() name set file
    [[ " $SELECTORS " != *" "@(monot5|adaptive)" "* ]] || rerank=(--rerank)
    [[ -z ${RELEASED:-} || -n ${PROMPTS:-} || -f $model/dynamicrag_prompts.yaml ]] || \
        echo "warning: RELEASED=$RELEASED is asked in this project's words; PROMPTS=FILE gives its own (docs/released_checkpoints.md)" >&2
    # shellcheck disable=SC2086  # SELECTORS, FILES and ENGINE_FLAGS are lists
    forecast answer "${rerank[@]}" -- "${PROMPT_FLAGS[@]}" --template "$TEMPLATE" --llm-model "$model" --topn "$N_DOCS_SHOWN" \
        --selector $SELECTORS --input-json $FILES ${ENGINE_FLAGS:-}
    [[ -z $DRY_RUN ]] || return 0
    name=$(basename "$model")
    [[ -f $model/config.json ]] || refuse "$model is missing; $([[ -n ${RELEASED:-} ]] && \
        echo "get it with: python prepare_data.py --name $name, or: hf download OWNER/$name --local-dir models/$name; then give RELEASED=models/$name" || \
        echo "train it with: bash scripts/reproduce.sh train $CONFIG, or set RELEASED to the folder of another")"
    for set in "${SETS[@]}"; do
        file=$WORK/eval_data/${set%%=*}.jsonl
        if ((${#rerank[@]})); then
            [[ ! -L $file ]] || rm "$file"
            rerank "${set#*=}" "$file"
        elif ! started "$file"; then  # else it was reranked before, and its documents are the same
            place "${set#*=}" "$file"
        fi
    done
    bash scripts/infer_all.sh "$CONFIG" "$model"
    [[ -z $SHARDS ]] || return 0
    bash scripts/10_evaluate.sh "$CONFIG"
    python scripts/all_sets.py --results_dir "$WORK/results" --sets "${SET_NAMES[@]}"
}

prepared
if [[ $ASKED == " train" ]]; then train_from_prepared; else answer_prepared; fi
