"""An evaluator's result: a plain dict, from which every table and report can be made again.

All evaluators' results have these keys in common (those marked ? may be left out):

    evaluator       "creditmix" or another label task | "idp" | "codegen" | "distill"
    data            path of the evaluated file; data_sha256?: its SHA-256
    split           "validation" | "dev" | "all"
    n               rows evaluated
    group_name?     what a group is, for the sentences ("customer"; default "group")
    models          [{"model_dir", "name"?, "contamination"?: {"rows", "of"} or None where nobody knows, "groups"?,
                      "replicates", ...}]
    command?        the command line; versions?: {package: version}; created?: date and time
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import PurePath
from typing import Any

Result = dict[str, Any]


def model_names(result: Result) -> list[str]:
    """A short name per model: `name`, else the last part of its path where that tells the models apart."""
    full = [str(model["model_dir"]) for model in result["models"]]
    last = [PurePath(path).name or path for path in full]
    short = last if len(set(last)) == len(last) else full
    return [model.get("name") or name for model, name in zip(result["models"], short, strict=True)]


def named_differences(result: Result, within: Mapping[str, str]) -> list[tuple[str, dict]]:
    """(what is compared, the differences): within each model, by key and in words, then between models."""
    names = model_names(result)
    short = {model["model_dir"]: name for model, name in zip(result["models"], names, strict=True)}
    of_models = [
        (f"{name}: {words}", model[key])
        for key, words in within.items()
        for name, model in zip(names, result["models"], strict=True)
        if key in model
    ]
    return of_models + [
        (f"{short[difference['a']]} - {short[difference['b']]}", difference) for difference in result["differences"]
    ]


def clean(model: dict) -> bool | None:
    """Whether no evaluated row shares a group with training; None where that is not known."""
    contamination = model.get("contamination")
    return None if contamination is None else contamination["rows"] == 0


def resampled(result: Result) -> str:
    """What the intervals were resampled from, in words."""
    model = result["models"][0]
    if model.get("groups") is None:
        return f"{model['replicates']:,} bootstrap replicates of rows"
    return f"{model['replicates']:,} bootstrap replicates of {model['groups']:,} {group_name(result)}s"


def group_name(result: Result) -> str:
    """What a group of rows is: "customer", "document", "problem"."""
    return str(result.get("group_name", "group"))


def json_line(
    result: Result,
    *,
    omit: Collection[str] = (),
    omit_of_models: Collection[str] = (),
    nested: Collection[str] = (),
) -> str:
    """The result on one line of JSON, without what is only for reading.

    Args:
        omit: keys of the result that are left out.
        omit_of_models: keys of each model that are left out,
        nested: and of further figures under these keys of a model.
    """

    def short(model: dict) -> dict:
        return {
            key: short(value) if key in nested and value else value
            for key, value in model.items()
            if key not in omit_of_models
        }

    kept = {key: value for key, value in result.items() if key not in omit}
    return json.dumps({**kept, "models": [short(model) for model in result["models"]]}, ensure_ascii=False)
