#!/usr/bin/env bash
# A second label set, from data to a calibrated classifier: how severe is a support ticket?
#
#   recipes/ticket_severity.sh               # everything lands in data/, models/tiny_tickets and runs/ticket_severity_sft
#   recipes/ticket_severity.sh ticket_urgency    # labels of several words; models/tiny_ticket_urgency, runs/ticket_urgency_sft
#   PYTHON=.venv/bin/python recipes/ticket_severity.sh
#
# For a task of your own: write a YAML file like recipes/ticket_severity.yaml, and give your rows to the second step.

set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
python=${PYTHON:-python}
name=${1:-ticket_severity}
task=recipes/$name.yaml
rows=data/$name
run=runs/${name}_sft
base=models/tiny_tickets
[[ $name == ticket_severity ]] || base=models/tiny_$name

"$python" recipes/make_tickets.py --task "$task" --rows 24000 --out data/tickets.jsonl
"$python" creditmix_prepare.py --task "$task" --src data/tickets.jsonl --outdir data
"$python" tiny_student.py --prompts "${rows}_sft.jsonl" --save_dir "$base"
"$python" sft_train.py --config recipes/creditmix_tiny_sft.yaml --student "$base" \
  --data "${rows}_sft.jsonl" --save_dir "$run" --overwrite
"$python" eval_creditmix.py --task "$task" --model_dir "$run" --fit_calibration "${rows}_dev.jsonl" --decision_json
"$python" eval_creditmix.py --task "$task" --model_dir "$base" "$run" \
  --data "${rows}_val.jsonl" --report_dir "$run/report"
"$python" infer_creditmix.py --task "$task" --model_dir "$run" \
  --features "Web shop. Users affected: 900, Hours open: 5, orders are charged twice, no workaround"
