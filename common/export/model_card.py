"""The model card of a run or an export: README.md, filled from what lies in its folder, so that it says no more.

Sources: `run.json`, `task.json`, `export.json`, the calibrations, and what evaluators kept (`run_figures`). Trainings,
evaluations and exports write it; a README.md that somebody has written is left alone. Of data there are names, counts
and SHA-256, no rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from common import cli, distributed, run_record
from common.data import task_record
from common.evaluation import run_figures
from common.evaluation.tables import contamination_text, interval_text
from common.export import proof_table
from common.files import atomic_write, parse_json
from common.models import adapters, gguf_import
from common.models.gguf_file import GgufFile

FILE = "README.md"
EXPORT_FILE = gguf_import.EXPORT_RECORD
MARK = "<!-- distill-slm: written from run.json; edits are lost unless this line goes -->"
FOREIGN = "[More Information Needed]"  # in what PEFT writes of itself
METHODS = {
    "sft": "supervised fine-tuning",
    "kd": "sequence-level knowledge distillation (on a teacher's texts)",
    "dpo": "direct preference optimisation",
    "distill": "distillation from a teacher's distributions",
}
WHAT = {
    "merged": "Adapter merged into the weights",
    "onnx": "ONNX graph",
    "int8": "ONNX graph in INT8",
    "onnx_genai": "ONNX folder for onnxruntime-genai",
    "gguf": "GGUF file",
    "gguf_lora": "LoRA adapter as GGUF",
}
ASKED_BY = {
    task_record.LABELS: 'infer_creditmix.py --model_dir {0} --features "..."',
    task_record.IDP: "infer_idp.py --model_dir {0} --schema schema.json --document_file document.pdf",
    task_record.CODEGEN: 'infer_codegen.py --model_dir {0} --prompt "Write a function ..."',
}
GENAI = """import json

import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
messages = json.dumps([{"role": "user", "content": "..."}])
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
generator = og.Generator(model, og.GeneratorParams(model))
generator.append_tokens(tokenizer.encode(prompt))
stream = tokenizer.create_stream()  # a character may take several tokens
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)"""
ONNX = """import numpy as np
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
session = onnxruntime.InferenceSession("model.onnx")
{ask}
tokens, answer, ends, cache = prompt, [], {ends}, {{}}
for entry in session.get_inputs():
    if entry.name.startswith("past_key_values"):
        number = np.float16 if entry.type == "tensor(float16)" else np.float32
        cache[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), dtype=number)
while len(answer) < 256 and (not answer or answer[-1] not in ends):
    seen = len(prompt) + len(answer)
    feed = {{
        "input_ids": np.array([tokens]),
        "attention_mask": np.ones((1, seen), dtype=np.int64),
        "position_ids": np.arange(seen - len(tokens), seen)[None],
    }}
    logits, *kept = session.run(None, feed | cache)
    cache = dict(zip(cache, kept))
    tokens = [int(logits[0, -1].argmax())]
    answer += tokens
print(tokenizer.decode(answer, skip_special_tokens=True))"""
TRANSFORMERS = """from {package} import {auto}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {auto}.from_pretrained("{name}")
{ask}
written = model.generate(torch.tensor([prompt]), max_new_tokens=256, do_sample=False)
print(tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True))"""
ASK_CHAT = """messages = [{"role": "user", "content": "..."}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)"""
ASK_PLAIN = 'prompt = tokenizer.encode("...\\n")'
SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "weight_decay", "max_len", "seed"),
    *("lora_r", "lora_alpha", "lora_dropout"),
)


def refresh(folders: Iterable[str | Path]) -> None:
    """Write, in the main process, the card of each folder that a training or an export has made.

    A folder whose records are broken, or that cannot be written, costs its card alone.
    """
    for folder in map(Path, folders if distributed.is_main() else ()):
        if (folder / run_record.FILE).is_file() or (folder / EXPORT_FILE).is_file():
            try:
                write(folder)
            except (cli.UserError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
                cli.log(f"{folder} gets no model card: {error}")


def write(folder: str | Path, hub_name: str | None = None) -> Path:
    """Write the card of a run or an export; returns its path. One that somebody else has written stays as it is.

    Args:
        hub_name: where others will find it.

    Raises:
        UserError: a record in the folder is broken, or it has none.
    """
    folder = Path(folder)
    path = folder / FILE
    if path.is_file():
        before = path.read_text(encoding="utf-8")
        if MARK not in before and FOREIGN not in before:
            return path
    with atomic_write(path) as handle:
        handle.write(card(folder, hub_name))
    return path


def card(folder: str | Path, hub_name: str | None = None) -> str:
    """The text of the card: metadata as the Hub reads it, and what there is to say.

    Raises:
        UserError: a record in the folder is broken, or it has none.
    """
    folder = Path(folder)
    export = _json(folder / EXPORT_FILE)
    origin = export.get("origin", {})
    run = run_record.read(folder) or _run_of(origin)
    if not run and not export:
        raise cli.UserError(f"{folder} has neither {run_record.FILE} nor {EXPORT_FILE}; give a run or an export")
    task = task_record.read(folder)
    base = origin.get("base") or run.get("base_model") or origin.get("model_dir")
    rights = licence(base)
    sections = [
        _metadata(folder, base, rights, run, task, export),
        MARK,
        f"# {folder.resolve().name}",
        _summary(folder, base, rights, run, task, export),
        _task_section(task),
        _data_section(run),
        _training_section(run),
        _figures_section(folder, export),
        _calibration_section(folder, task),
        _proof_section(export),
        _use_section(folder, base, task, export, hub_name),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise cli.UserError(f"{path} is broken ({error}); make it again, or remove it") from error
    if not isinstance(content, dict):
        raise cli.UserError(f"{path} is broken (no JSON object); make it again, or remove it")
    return content


def _run_of(origin: dict[str, Any]) -> dict[str, Any]:
    """The record of the run that an export was made from, while that run is there."""
    return (run_record.read(origin["model_dir"]) if origin.get("model_dir") else None) or {}


def _name(path: str | None) -> str:
    """A Hub id as it is; of a path the last part, which tells nothing of a machine."""
    if not path:
        return "unknown"
    local = Path(path).is_absolute() or Path(path).exists() or path.startswith((".", "~")) or "\\" in path
    return (PureWindowsPath(path).name or path) if local or path.count("/") > 1 else path


# The parts.


def licence(base: str | None) -> str | None:
    """What the files of a base say of its licence, as the Hub writes it; None where they say nothing."""
    if not base:
        return None
    made_of = gguf_import.origin(base)
    if made_of and Path(made_of["path"]).is_file():
        return GgufFile(made_of["path"]).get("general.license")
    from huggingface_hub import metadata_load, try_to_load_from_cache

    path = Path(base, FILE)
    if not path.is_file():
        known = None if Path(base).exists() or base.count("/") > 1 else try_to_load_from_cache(base, FILE)
        path = Path(known) if isinstance(known, str) else path
    declared = (metadata_load(path) or {}).get("license") if path.is_file() else None
    return declared if isinstance(declared, str) else None


def _metadata(folder: Path, base: str | None, rights: str | None, run: dict, task: dict | None, export: dict) -> str:
    from huggingface_hub import ModelCardData

    form = export.get("format")
    libraries = {None: "peft" if adapters.is_adapter(str(folder)) else "transformers", "merged": "transformers"}
    libraries |= dict.fromkeys(("onnx", "int8", "onnx_genai"), "onnx")
    tags = ["distill-slm", run.get("method"), task and task["name"], form, export.get("unproven") and "unproven"]
    is_hub_id = base and _name(base) == base and "/" in base
    data = ModelCardData(
        base_model=base if is_hub_id else None,
        license=rights,
        library_name=libraries.get(form, "gguf"),
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(filter(None, tags))),
    )
    return f"---\n{data.to_yaml()}\n---"


def _summary(folder: Path, base: str | None, rights: str | None, run: dict, task: dict | None, export: dict) -> str:
    form = export.get("format")
    what = WHAT.get(form, "LoRA adapter" if adapters.is_adapter(str(folder)) else "All weights")
    method = METHODS.get(run.get("method"), run.get("method"))
    trained = f", trained by {method}" if method else ""
    made_of = run.get("gguf", {}).get("student")
    of_file = f" (made of `{_name(made_of['path'])}`, SHA-256 `{made_of['sha256']}`)" if made_of else ""
    purpose = {
        None: "",
        task_record.LABELS: " It ranks the labels of a row.",
        task_record.IDP: " It turns a document into JSON that is valid by a schema.",
        task_record.CODEGEN: " It writes Python code.",
    }.get(task and task["kind"], "")
    said = f"The base's licence is `{rights}`." if rights else "The base's files name no licence."
    return f"{what} of `{_name(base)}`{of_file}{trained}, by distill-slm.{purpose} {said}"


def _task_section(task: dict | None) -> str:
    if not task or task["kind"] == task_record.ROWS:
        return ""
    lines = [f"## Task\n\n`{task['name']}`"]
    if task.get("instruction"):
        lines.append("> " + task["instruction"].replace("\n", "\n> "))
    if task.get("labels"):
        lines.append("Labels: " + ", ".join(f"`{label}`" for label in task["labels"]))
    if task.get("schema"):
        lines.append(f"```json\n{json.dumps(task['schema'], indent=2, ensure_ascii=False)}\n```")
    return "\n\n".join(lines)


def _data_section(run: dict) -> str:
    data = run.get("data")
    files = data if isinstance(data, list) else [data] if data else []
    if not files:
        return ""
    rows = [
        [f"`{_name(one['path'])}`", f"{one['rows']:,}", f"`{one['sha256']}`" if "sha256" in one else ""]
        for one in files  # a data set of the Hub has no hash
    ]
    return "## Training data\n\n" + _table(["file", "rows", "SHA-256"], rows)


def _training_section(run: dict) -> str:
    if not run:
        return ""
    settings = run.get("settings", {})
    facts = {
        "method": run.get("method"),
        "teacher": _name(settings["teacher"]) if settings.get("teacher") else None,
        "started from": _name(settings["init_adapter"]) if settings.get("init_adapter") else None,
        "steps": run.get("steps"),
        "rows a step": run.get("effective_batch"),
        **{name: settings.get(name) for name in SETTINGS},
        "layers with an adapter": ", ".join(run.get("adapted") or {}) or None,
        "trainable parameters": run.get("trainable_parameters"),
        "mean loss": run.get("train_loss"),
        "held-out loss": run.get("final_eval_loss"),
        "device": run.get("device"),
        "seconds": run.get("seconds"),
        "toolkit's commit": run.get("git_commit"),
        "versions": ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items()) or None,
    }
    rows = [[name, _shown(value)] for name, value in facts.items() if value is not None]
    state = "" if run.get("state") == "done" else f"The run is not done: its state is `{run.get('state')}`.\n\n"
    return f"## Training\n\n{state}" + _table(["", ""], rows)


def _figures_section(folder: Path, export: dict) -> str:
    try:
        evaluations = run_figures.read(folder)
    except ValueError as error:
        raise cli.UserError(f"{folder}: {error}; evaluate again, or remove it") from error
    if not evaluations:
        known = "Of the export itself there is the proof below." if export.get("proof") else "It was not evaluated yet."
        return f"## Figures\n\n{known}"
    return "## Figures\n\n" + "\n\n".join(map(_figures, evaluations))


def _figures(evaluation: run_figures.Record) -> str:
    rows = [
        [key, interval_text(figure)]
        for key, figure in evaluation["figures"].items()
        if {"value", "low", "high"} <= figure.keys()
    ]
    about = (
        f"{evaluation['n']:,} rows, the {evaluation['split']} part of `{_name(evaluation['data'])}` (SHA-256 "
        f"`{evaluation['data_sha256']}`); of a group that it was trained on: {contamination_text(evaluation)}. "
        f"{evaluation['created']}, toolkit's commit {evaluation['commit'] or 'unknown'}."
    )
    return f"{about}\n\n" + _table(["", "value [95 % interval]"], rows)


def _calibration_section(folder: Path, task: dict | None) -> str:
    if not task or task["kind"] not in (task_record.LABELS, task_record.IDP):
        return ""
    fitted = sorted(path.name for path in folder.glob("calibration*.json"))
    said = f"Fitted on dev rows, in `{'`, `'.join(fitted)}`." if fitted else "None was fitted."
    return f"## Calibration\n\n{said}"


def _proof_section(export: dict) -> str:
    proof = export.get("proof")
    if export.get("unproven"):
        return (
            "## Proof\n\n**Unproven.** It was exported with `--no_proof`: nobody has compared its answers with those "
            "of the run that it was made from."
        )
    if not proof:
        return ""
    metric, logits, generated = proof["metric"], proof["logits"], proof["generated"]
    judged = proof_table.judged(export)
    by_likelihood = [["change of the likelihood, which is judged", interval_text(judged["difference"], signed=True)]]
    rows = [
        [f"{metric['name']} of the run", f"{metric['reference']['value']:.4f}"],
        [f"{metric['name']} of the export", f"{metric['export']['value']:.4f}"],
        ["difference, paired", interval_text(metric["difference"], signed=True)],
        *(by_likelihood if judged is not metric else []),
        ["mean KL from the run's next tokens", f"{logits['mean_kl']:.3g} nats"],
        ["greedy texts that are equal", f"{generated['equal']} of {generated['prompts']}"],
        ["bytes", f"{proof['speed']['export']['bytes']:,}"],
    ]
    files = [[f"`{name}`", f"{about['bytes']:,}", f"`{about['sha256']}`"] for name, about in export["files"].items()]
    return (
        f"## Proof\n\n{export['dtype']}, run in {export['runtime']}, on {proof['rows']:,} rows of "
        f"`{_name(proof['data'])}`.\n\n{_table(['', ''], rows)}\n\n{_table(['file', 'bytes', 'SHA-256'], files)}"
    )


def _use_section(folder: Path, base: str | None, task: dict | None, export: dict, hub_name: str | None) -> str:
    form, name = export.get("format"), folder.resolve().name
    blocks = []
    if form in (None, "merged", "onnx", "int8", "gguf") and task and task["kind"] in ASKED_BY:
        packed = " --engine llama_cpp" if form == "gguf" else ""
        blocks.append(("distill-slm", "bash", f"python {ASKED_BY[task['kind']].format(name)}{packed}"))
    if form in (None, "merged"):
        blocks.append(("transformers", "python", _transformers(folder, hub_name or name, base)))
        made = "\n".join(
            f"python export_model.py --model_dir {name} --format {other} --save_dir exports/{name}_{other}"
            for other in ("gguf", "onnx", "onnx_genai")
        )
        title = "llama.cpp and Ollama, ONNX Runtime, onnxruntime-genai, from an export whose card says how"
        blocks.append((title, "bash", made))
    if form in ("onnx", "int8"):
        code = ONNX.format(ask=_ask(folder), ends=_ends(folder))
        blocks.append(("ONNX Runtime", "python", code))
    if form == "onnx_genai":
        blocks.append(("onnxruntime-genai", "python", GENAI))
    if form in ("gguf", "gguf_lora"):
        (file,) = [file_name for file_name in export["files"] if file_name.endswith(".gguf")]
        model = f"-m {file}" if form == "gguf" else f"-m base-{export['base_quant']}.gguf --lora {file}"
        title = "llama.cpp" if form == "gguf" else f"llama.cpp, on `{_name(base)}` as GGUF"
        blocks.append((title, "bash", f"llama-server {model}"))
        blocks.append(("Ollama", "bash", f"ollama create {name.lower()} -f Modelfile\nollama run {name.lower()}"))
    return "## Use\n\n" + "\n\n".join(f"{title}:\n\n```{kind}\n{code}\n```" for title, kind, code in blocks)


def _transformers(folder: Path, name: str, base: str | None) -> str:
    adapter = adapters.is_adapter(str(folder))
    auto = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    texts = Path(adapters.tokenizer_folder(str(folder), base))
    package = "peft" if adapter else "transformers"
    return "import torch\n" + TRANSFORMERS.format(package=package, auto=auto, name=name, ask=_ask(texts))


def _ask(folder: Path) -> str:
    """How a question becomes the tokens of a prompt, by the tokenizer in a folder."""
    files = [folder / "chat_template.jinja", folder / "tokenizer_config.json"]
    plain = files[1].is_file() and not files[0].is_file() and not _json(files[1]).get("chat_template")
    return ASK_PLAIN if plain else ASK_CHAT


def _ends(folder: Path) -> list[int]:
    """The tokens that end an answer, as a model's own files say."""
    ends = _json(folder / "generation_config.json").get("eos_token_id", [])
    return ends if isinstance(ends, list) else [ends]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *cells])
