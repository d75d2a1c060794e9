#!/usr/bin/env bash
# A second label set, from data to a calibrated classifier: how severe is a support ticket?
#
#   recipes/ticket_severity.sh               # everything lands in data/, models/tiny_tickets and runs/ticket_severity_sft
#   PYTHON=.venv/bin/python recipes/ticket_severity.sh
#
# For a task of your own: write a YAML file like recipes/ticket_severity.yaml, and give your rows to the second step.

set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
python=${PYTHON:-python}
task=recipes/ticket_severity.yaml
run=runs/ticket_severity_sft

"$python" recipes/make_tickets.py --rows 24000 --out data/tickets.jsonl
"$python" creditmix_prepare.py --task "$task" --src data/tickets.jsonl --outdir data
"$python" tiny_student.py --prompts data/ticket_severity_sft.jsonl --save_dir models/tiny_tickets
"$python" sft_train.py --config recipes/creditmix_tiny_sft.yaml --student models/tiny_tickets \
  --data data/ticket_severity_sft.jsonl --save_dir "$run" --overwrite
"$python" eval_creditmix.py --task "$task" --model_dir "$run" --fit_calibration data/ticket_severity_dev.jsonl
"$python" eval_creditmix.py --task "$task" --model_dir models/tiny_tickets "$run" \
  --data data/ticket_severity_val.jsonl --report_dir "$run/report"
"$python" infer_creditmix.py --task "$task" --model_dir "$run" \
  --features "Web shop. Users affected: 900, Hours open: 5, orders are charged twice, no workaround"
