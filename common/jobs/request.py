"""From a request's JSON to the commands that a person would type, with every field checked by the script's own parser.

A field is a flag of the trainer without its dashes, or one of the names below. So the service knows no setting that
the scripts do not have, and none is described twice.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from common import cli
from common.cli import UserError
from common.distillation import flags as distillation_flags
from common.distillation.settings import OF_DATASET, DistillSettings
from common.export.formats import FORMATS, GGUF, GGUF_LORA, QUANTS
from common.jobs import export_check
from common.jobs.checks import CACHES, NAME, Reach
from common.jobs.files import TEXT
from common.training import flags as training_flags
from common.training.settings import DpoSettings, KdSettings, TrainSettings
from common.web.app import Problem


@dataclass(frozen=True)
class Method:
    """A way to train: the script that does it, what adds its flags to a parser, and what makes settings of them."""

    script: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    settings_of: Callable[[argparse.Namespace], TrainSettings]
    kind: type[TrainSettings]


DISTILL = "distill"
METHODS = {
    DISTILL: Method("distill_train.py", distillation_flags.add_flags, distillation_flags.settings_of, DistillSettings),
    "sft": Method("sft_train.py", training_flags.add_flags, training_flags.sft_settings, TrainSettings),
    "kd": Method("kd_train.py", training_flags.add_flags, training_flags.kd_settings, KdSettings),
    "dpo": Method("dpo_train.py", training_flags.add_dpo_flags, training_flags.dpo_settings, DpoSettings),
}
EXPORTER = "export_model.py"
EXPORTS = {  # what a request may list, which is also the folder among the artifacts: the exporter's flags
    **{name: [f"--format={name}"] for name in FORMATS if name != GGUF},
    **{f"{GGUF}-{quant}": [f"--format={GGUF}", f"--quant={quant}"] for quant in QUANTS},
}
LISTED = "exports"
EXPORT_SWITCHES = {"post_training_quant": "int8", "export_onnx": "onnx"}  # names of the llm2slm payload
NO_PROOF = "no_proof"
SWITCHES = {
    "use_qat": "train all weights with int8 rounding simulated, as --quantization_aware int8 does",
    "post_training_quant": "export an int8 model after the training",
    "export_onnx": "export an ONNX model after the training",
    NO_PROOF: "do not compare these exports with the model; their files say that they are unproven",
}
ALIASES = {  # names of the llm2slm payload, for methods whose script does not know them itself
    "teacher_model": "teacher",
    "student_model": "student",
    "per_device_batch_size": "per_device_train_batch_size",
    "grad_accum_steps": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "save_every": "save_steps",
}
QAT = "quantization_aware"
OF_THE_SERVER = (
    "save_dir",
    "output_dir",
    "resume",
    "with_changes",
    "overwrite",
    "dry_run",
    "config",
    "trust_remote_code",
    "report_to",
    "help",
)
JOB_NAME = "name"  # of the job: a setting of none of the scripts
MODELS, FILES = ("student", "teacher"), ("data", "eval_data", "task")
INPUTS = (*MODELS, "init_adapter", *FILES, "dataset")  # what a training reads
LONGEST = 4096  # characters of a text
MOST = 1e9
RANGES = {  # of numbers, both ends included; where the scripts would take more, or find out late
    "epochs": (1e-6, 1e6), "max_steps": (-1, MOST), "learning_rate": (1e-12, 10), "weight_decay": (0, 10),
    "warmup_steps": (0, MOST), "max_grad_norm": (0, MOST), "lora_dropout": (0, 0.999), "lora_r": (0, 4096),
    "lora_alpha": (1, 65_536), "temperature": (1e-3, 1e3), "beta": (1e-9, 1e3), "jsd_beta": (1e-6, 1 - 1e-6),
    "per_device_train_batch_size": (1, 65_536), "gradient_accumulation_steps": (1, 65_536), "max_len": (1, 1 << 20),
    "seed": (0, 2**32 - 1), "forward_kl": (0, 1e6), "reverse_kl": (0, 1e6), "jsd": (0, 1e6), "ce": (0, 1e6),
    "teacher_ce": (0, 1e6), "hidden_mse": (0, 1e6), "hidden_cosine": (0, 1e6), "attention_mse": (0, 1e6),
}  # fmt: skip


@dataclass(frozen=True)
class PlannedJob:
    """A request that has passed: its method, the training's settings, and what the worker is to run.

    Attributes:
        commands: {"argv": script and flags, "output": "" of the training, the folder among the artifacts that an
            export writes, else None}.
    """

    method: str
    settings: TrainSettings
    commands: list[dict[str, Any]]


class Planner:
    """Turns requests into plans.

    Args:
        scripts: folder of the scripts.
        data_dir: of the service; caches of a teacher are kept there by name.
        elsewhere: jobs run with other packages than the service.
    """

    def __init__(self, scripts: Path, data_dir: Path, reach: Reach, *, elsewhere: bool = False) -> None:
        self.scripts, self.data_dir, self.reach, self.elsewhere = scripts, data_dir, reach, elsewhere

    @cache  # noqa: B019 (one planner lives as long as the server)
    def parser(self, method: str) -> argparse.ArgumentParser:
        """What parses the flags of a method's script."""
        parser = cli.parser(method, prog=METHODS[method].script)
        METHODS[method].add_flags(parser)
        return parser

    def fields(self, method: str) -> dict[str, argparse.Action]:
        """What a request may set, by every name that it has."""
        flags = {flag[2:]: action for flag, action in self.parser(method)._option_string_actions.items()}
        known = {name: action for name, action in flags.items() if action.dest not in OF_THE_SERVER}
        return known | {alias: known[name] for alias, name in ALIASES.items() if name in known}

    def plan(self, payload: Mapping[str, Any], save_dir: Path) -> PlannedJob:
        """What to run for a request.

        Raises:
            Problem: 422 that names the field.
        """
        method = payload.get("method", DISTILL)
        if not isinstance(method, str) or method not in METHODS:
            raise Problem(422, f"method: must be one of {', '.join(METHODS)}", "method")
        given = self._settings(method, payload)
        if ("data" in given) == ("dataset" in given):
            wanted = "data or dataset, one of the two" if "dataset" in self.fields(method) else "data"
            raise Problem(422, f"data: give {wanted}", "data")
        values = {name: self._reached(name, *asked) for name, asked in given.items()}
        names = {name: field for name, (field, _) in given.items()}
        if os.path.isfile(values.get("dataset", "")):
            values, names = of_a_file(values, names), names | {"data": names["dataset"]}
        fields = self.fields(method)
        argv = [f"--save_dir={save_dir}", *(word for name in values for word in flag(fields[name], values[name]))]
        if (method == DISTILL or QAT in given) and not given.keys() & {"lora_r", "init_adapter"}:
            argv.append("--lora_r=0")  # a whole model, unless an adapter is asked for
        settings = self._parse(method, argv, names)
        script = str(self.scripts / METHODS[method].script)
        exports = wanted_exports(payload)
        if GGUF_LORA in exports and settings.full:
            raise Problem(422, f"{LISTED}: {GGUF_LORA} is an adapter alone, and lora_r 0 trains all weights", LISTED)
        proof, unproven = save_dir.with_name("proof.jsonl"), switch(payload, NO_PROOF)
        if unproven and not exports:
            raise Problem(422, f"{NO_PROOF}: goes with {LISTED}; list some, or leave it out", NO_PROOF)
        proves = bool(exports) and not unproven
        commands = self._checked(exports, proves)
        if proves:
            commands.append({"argv": proof_command(settings, proof), "output": None})  # what has none fails at once
        commands.append({"argv": [script, *argv], "output": ""})
        for name in exports:
            words = [f"--model_dir={save_dir}", *EXPORTS[name], f"--save_dir={save_dir / name}"]
            words.append(f"--proof_data={proof}" if proves else f"--{NO_PROOF}")
            commands.append({"argv": [str(self.scripts / EXPORTER), *words], "output": name})
        return PlannedJob(method, settings, commands)

    def _checked(self, exports: Sequence[str], proves: bool) -> list[dict[str, Any]]:
        """What asks, where the jobs run, for the packages that exports need; nothing where that is here.

        Raises:
            Problem: 422 where it is here, and one is not installed.
        """
        if self.elsewhere:
            words = ["-m", "common.jobs.export_check", *exports, *[f"--{NO_PROOF}"] * (not proves)]
            return [{"argv": words, "output": None}] * bool(exports)
        try:
            export_check.check(exports, proves=proves)
        except UserError as error:
            raise Problem(422, str(error), LISTED) from error
        return []

    def _settings(self, method: str, payload: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
        """{name of the setting: (name it was given under, value)}; null counts as not given."""
        fields = self.fields(method)
        given: dict[str, tuple[str, Any]] = {}
        for field, value in payload.items():
            if field in ("method", LISTED, NO_PROOF, *EXPORT_SWITCHES) or value is None:
                continue
            if field == JOB_NAME:
                check_name(value)
                continue
            if field == "use_qat":
                if not switch(payload, field):
                    continue
                value = "int8"
            action = fields.get(QAT if field == "use_qat" else field)
            if action is None:
                raise Problem(422, f"{shown(field)}: no setting of the method {method}; /docs lists them", shown(field))
            if action.dest in given:
                first = given[action.dest][0]
                raise Problem(422, f"{field} and {first} are names of one setting; give one of them", field)
            check_value(field, action, value)
            given[action.dest] = (field, value)
        return given

    def _reached(self, name: str, field: str, value: Any) -> Any:
        """A model or data set by its place; other values as they are."""
        if name in MODELS:
            return self.reach.model(field, value)
        if name == "init_adapter":
            return self.reach.folder(field, value)
        if name in FILES:
            return self.reach.file(field, value)
        if name == "dataset":
            return self.reach.dataset(field, value)
        if name == "teacher_cache":
            return str(self.data_dir / CACHES / self.reach.plain_name(field, value))
        if isinstance(value, str) and ("/" in value or value.startswith((".", "~"))):
            raise Problem(422, f"{field}: must not be a path", field)
        return value

    def asked_for(self, method: str, request: Mapping[str, Any], flag: str) -> tuple[str, Any] | None:
        """(field, value) of a request that a flag of its training is made of; None where none is."""
        known, names = self.fields(method), (flag, "dataset") if flag == "data" else (flag,)
        given = ((field, value) for field, value in request.items() if field in known and value is not None)
        return next(((field, value) for field, value in given if known[field].dest in names), None)

    def _parse(self, method: str, argv: list[str], names: Mapping[str, str]) -> TrainSettings:
        """The settings, when the script's parser and its checks take them."""
        try:
            return METHODS[method].settings_of(cli.parse_args(self.parser(method), argv))
        except UserError as error:
            message = str(error).partition(" (see: ")[0]
            known = self.fields(method)
            flags = re.findall(r"--(\w+)", message)  # those that it blames, in its order
            blamed = [known[name].dest for name in flags if name in known]
            field = next((names[name] for name in blamed if name in names), (blamed or ["body"])[0])
            raise Problem(422, f"{field}: {message}", field) from error

    def schema(self) -> dict[str, Any]:
        """JSON Schema of a request, for the API's description: the settings of all methods."""
        properties: dict[str, Any] = {"method": {"type": "string", "enum": list(METHODS), "default": DISTILL}}
        methods: dict[str, list[str]] = {}
        for method in METHODS:
            for field, action in self.fields(method).items():
                properties.setdefault(field, described(action))
                methods.setdefault(field, []).append(method)
        for field, names in methods.items():
            if len(names) < len(METHODS):
                about = properties[field].get("description", "")
                properties[field]["description"] = f"{about} (methods: {', '.join(names)})".strip()
        properties[JOB_NAME] = {
            "type": "string",
            "pattern": f"^{NAME.pattern}$",
            "description": "What the job is called",
        }
        properties[LISTED] = {
            "type": "array",
            "items": {"type": "string", "enum": list(EXPORTS)},
            "minItems": 1,
            "description": "Formats to export the model in after the training, each into a folder of that name",
        }
        for field, words in SWITCHES.items():
            properties[field] = {"type": "boolean", "default": False, "description": words}
        return {"type": "object", "properties": properties, "additionalProperties": False}


def of_a_file(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a dataset that is a file, which is none of the datasets library's, as those of --data.

    Args:
        values, names: each setting's value, and the field that it was given as.

    Raises:
        Problem: 422 where a part or a column of its rows is asked for; of running text it would be the same.
    """
    for name in OF_DATASET:
        default = getattr(DistillSettings, name)
        if Path(values["dataset"]).suffix != TEXT and values.get(name, default) != default:
            field = names[name]
            raise Problem(422, f"{field}: the dataset is a file, which has no {name}; leave it out", field)
    kept = {name: value for name, value in values.items() if name not in ("dataset", *OF_DATASET)}
    return kept | {"data": values["dataset"]}


def as_taken_now(command: dict[str, Any]) -> dict[str, Any]:
    """A job's command; of a training without the flags that decide nothing beside its others, as of an earlier version,
    which took them. Those of an adapter that is started from get its own values: without one, DPO has no dropout.
    """
    script, *words = command["argv"]
    for method in METHODS.values():
        if Path(script).name == method.script:
            parser = cli.parser(method.script)
            method.add_flags(parser)
            with contextlib.suppress(UserError):  # what is wrong the script says
                values = vars(cli.parse_args(parser, words))
                adapter, idle = values["init_adapter"], method.kind.idle(values)
                own = training_flags.own_settings(adapter) if adapter else {}
                taken = {name: [f"--{name}={own[name]}"] if name in own else [] for name in idle}
                named = [(word.partition("=")[0].removeprefix("--"), word) for word in words]
                words = [kept for name, word in named for kept in taken.get(name, [word])]
            return command | {"argv": [script, *words]}
    return command


def proof_command(settings: TrainSettings, output: Path) -> list[str]:
    """What writes the rows that an export is compared on: held-out ones where there are any."""
    words = ["-m", "common.jobs.proof_rows", f"--output={output}"]
    if settings.eval_data or settings.data:
        return [*words, f"--data={settings.eval_data or settings.data}"]
    assert isinstance(settings, DistillSettings)  # no other method goes without --data
    names = ("dataset", *OF_DATASET)
    return [*words, *(f"--{name}={value}" for name in names if (value := getattr(settings, name)) is not None)]


def shown(name: str) -> str:
    """A name from a request as it may stand in a message."""
    return name[:60].encode("ascii", "backslashreplace").decode()


def wanted_exports(payload: Mapping[str, Any]) -> list[str]:
    """Of `EXPORTS` those that a request asks for. Raises Problem 422."""
    listed = payload.get(LISTED)
    if listed is not None and not (isinstance(listed, list) and listed and all(name in [*EXPORTS] for name in listed)):
        raise Problem(422, f"{LISTED}: must be a list of some of {', '.join(EXPORTS)}", LISTED)
    switched = [name for field, name in EXPORT_SWITCHES.items() if switch(payload, field)]
    return list(dict.fromkeys([*switched, *(listed or [])]))


def switch(payload: Mapping[str, Any], field: str) -> bool:
    """A field that is true or false; Problem 422 for anything else."""
    value = payload.get(field)
    if value is not None and not isinstance(value, bool):
        raise Problem(422, f"{field}: must be true or false", field)
    return bool(value)


def check_name(value: Any) -> None:
    """Raises Problem 422 for what is no name of a job."""
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise Problem(
            422, f"{JOB_NAME}: give 1 to 64 letters, digits, '.', '_' and '-', a letter or digit first", JOB_NAME
        )


def json_type(action: argparse.Action) -> str | None:
    """The JSON type of a flag's value; None where a type of its own takes texts and numbers."""
    if action.nargs == 0:
        return "boolean"
    if action.type in (int, cli.positive_int, cli.whole_number, cli.seed):
        return "integer"
    if action.type in (float, cli.fraction):
        return "number"
    return "string" if action.type in (None, str, cli.folder) else None


def check_value(field: str, action: argparse.Action, value: Any) -> None:
    """Raises Problem 422 for a value whose type or range is not the flag's."""
    if action.nargs in ("+", "*"):
        if not isinstance(value, list) or not value:
            raise Problem(422, f"{field}: must be a list that is not empty", field)
        for item in value:
            check_one(field, action, item)
    else:
        check_one(field, action, value)


def check_one(field: str, action: argparse.Action, value: Any) -> None:
    kind = json_type(action)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        "boolean": isinstance(value, bool),
        "integer": isinstance(value, int) and is_number,
        "number": is_number,
        "string": isinstance(value, str),
        None: isinstance(value, str) or is_number,
    }
    if not fits[kind]:
        words = {"boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "a text"}
        raise Problem(422, f"{field}: must be {words.get(kind, 'a text or a number')}", field)
    if is_number:
        low, high = RANGES.get(action.dest, (-MOST, MOST))
        if not low <= value <= high:  # also what is not a number
            raise Problem(422, f"{field}: must be between {low:g} and {high:g}", field)
    elif isinstance(value, str):
        if not value.strip() or len(value) > LONGEST or not value.isprintable():
            raise Problem(422, f"{field}: must be 1 to {LONGEST} printable characters", field)
        if action.choices and value not in action.choices:
            raise Problem(422, f"{field}: must be one of {', '.join(map(str, action.choices))}", field)


def flag(action: argparse.Action, value: Any) -> list[str]:
    """A setting as words of a command line."""
    name = f"--{action.dest}"
    name = name if name in action.option_strings else action.option_strings[0]
    if action.nargs == 0:
        return [name] if value else []
    if isinstance(value, list):
        return [name, *map(str, value)]
    return [f"{name}={value}"]


def described(action: argparse.Action) -> dict[str, Any]:
    """JSON Schema of a flag's value."""
    kind = json_type(action)
    schema: dict[str, Any] = {"type": kind or ["string", "number"]}
    if kind in ("integer", "number") and action.dest in RANGES:
        low, high = RANGES[action.dest]
        schema |= {"minimum": low, "maximum": high}
    if action.choices:
        schema["enum"] = list(action.choices)
    if action.nargs in ("+", "*"):
        schema = {"type": "array", "items": schema, "minItems": 1}
    if action.default is not None and action.default is not argparse.SUPPRESS and not action.required:
        schema["default"] = action.default
    if action.help and action.help is not argparse.SUPPRESS:
        schema["description"] = action.help % vars(action) if "%(" in action.help else action.help
    return schema
