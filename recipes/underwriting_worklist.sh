#!/usr/bin/env bash
# Application letters -> JSON -> line of features -> credit class with its margin -> a work list for the underwriters:
#
#   recipes/underwriting_worklist.sh                  # offline: made-up letters, miniatures trained where there are none
#   recipes/underwriting_worklist.sh letters.jsonl    # rows {"document"[, "id"]}
#   READER=runs/sft_idp CLASSIFIER=runs/creditmix_sft recipes/underwriting_worklist.sh letters.jsonl
#   PYTHON=.venv/bin/python recipes/underwriting_worklist.sh
#
# Stopped, it goes on where it was when it is run again, but for a training, which begins anew.
#
# READER reads letters into recipes/application_schema.json, CLASSIFIER tells the class. The work list comes to
# runs/underwriting/worklist.csv: letters that nobody could read first, then Bad before Standard before Good, and within
# a class the least certain first.

set -euo pipefail

# from_here PATH: what the user means by it, after the `cd`.
from_here() { [[ -z $1 || $1 == /* ]] && printf %s "$1" || printf %s "$PWD/$1"; }

given=$(from_here "${1:-}")
reader=$(from_here "${READER:-}")
classifier=$(from_here "${CLASSIFIER:-}")
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
python=${PYTHON:-python}
reader=${reader:-runs/sft_applications}
classifier=${classifier:-runs/creditmix_sft}
schema=recipes/application_schema.json
work=runs/underwriting

is_model() { [[ -e $1/adapter_config.json || -e $1/config.json ]]; }

# trained_here RUN ROWS: whether this script trains, or has trained, RUN on ROWS, which are its own.
trained_here() { grep -qsF "\"$2\"" "$1/run.json"; }

# train RECIPE BASE ROWS RUN
train() {
  local again=()
  if trained_here "$4" "$3"; then again=(--overwrite); fi # it was stopped
  "$python" sft_train.py --config "$1" --student "$2" --data "$3" --save_dir "$4" ${again[@]+"${again[@]}"}
}

if ! is_model "$reader"; then
  "$python" recipes/make_applications.py --rows 4000 --out data/applications.jsonl
  "$python" idp_prepare.py --src data/applications.jsonl --schema "$schema" --outdir "$work"
  "$python" tiny_student.py --prompts "$work/idp_sft.jsonl" --copying --steps 600 --rows_per_step 24 \
    --learning_rate 0.015 --save_dir models/tiny_applications
  train recipes/idp_tiny_sft.yaml models/tiny_applications "$work/idp_sft.jsonl" "$reader"
fi
if trained_here "$reader" "$work/idp_sft.jsonl" && [[ ! -e $reader/report/metrics.json ]]; then
  "$python" eval_idp.py --model_dir "$reader" --data "$work/idp_val.jsonl" --val_frac 0.2 --schema "$schema" \
    --report_dir "$reader/report"
fi
if ! is_model "$classifier"; then
  "$python" creditmix_prepare.py --synthesize 9000 --outdir "$work"
  "$python" tiny_student.py --prompts "$work/creditmix_sft.jsonl" --save_dir models/tiny_creditmix
  train recipes/creditmix_tiny_sft.yaml models/tiny_creditmix "$work/creditmix_sft.jsonl" "$classifier"
fi
if trained_here "$classifier" "$work/creditmix_sft.jsonl" && [[ ! -e $classifier/calibration.json ]]; then
  "$python" eval_creditmix.py --model_dir "$classifier" --fit_calibration "$work/creditmix_dev.jsonl"
fi

letters=${given:-$work/letters.jsonl}
[[ -n $given ]] || "$python" recipes/make_applications.py --rows 40 --seed 1 --out "$letters"
"$python" infer_idp.py --model_dir "$reader" --schema "$schema" --input "$letters" --output "$work/read.jsonl" \
  --confidence || [[ $? == 1 || $? == 4 ]] # letters without a whole answer are part of the list
"$python" recipes/worklist.py features --read "$work/read.jsonl" --out "$work/features.jsonl"
"$python" infer_creditmix.py --model_dir "$classifier" --input "$work/features.jsonl" --output "$work/answers.jsonl"
"$python" recipes/worklist.py list --read "$work/read.jsonl" --answers "$work/answers.jsonl" --out "$work/worklist.csv"
head -n 11 "$work/worklist.csv"
