"""Peers with pins of their own, unsloth and vLLM, each at work in a Python of its own: other benches start this file.

It needs the peer alone and nothing of this project. On stdin come JSON lines: the settings first, then an empty object
for every turn; on stdout go as many answers, the first when the peer is ready. What the peer itself prints goes to
stderr. Written to the documentation and sources of unsloth 2026.10 and vLLM 0.33 and tried with stand-ins only: neither
has been run here for want of a card.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

END = 60  # seconds that a peer may take to end
Turn = Callable[[], dict[str, Any]]


def unsloth(settings: dict[str, Any]) -> Turn:
    """LoRA on unsloth's kernels under TRL's SFTTrainer; a turn trains, saves the adapter and tells the timed seconds.

    Rows come with their labels as token ids, which unsloth's trainer takes as they are. Batches are padded.
    """
    from unsloth import FastLanguageModel  # isort: skip (before those below, which it patches)
    import torch
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=settings["model"],
        max_seq_length=settings["max_len"],
        load_in_4bit=settings["load_in_4bit"],
        use_exact_model_name=True,  # else a Hub id may become that of weights which unsloth has quantised
    )
    model = FastLanguageModel.get_peft_model(
        model,
        **settings["lora"],
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=settings["seed"],
    )
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if cuda:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    def turn() -> dict[str, Any]:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**_sft_settings(settings, cuda)),
            train_dataset=Dataset.from_list(settings["rows"]),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
        model.save_pretrained(settings["save_dir"])
        return {"seconds": marks[-1] - marks[settings["warm_up"] - 1]}

    return turn


def _sft_settings(settings: dict[str, Any], cuda: bool) -> dict[str, Any]:
    """What TRL's SFTConfig is given."""
    return {
        "output_dir": settings["save_dir"],
        "per_device_train_batch_size": settings["batch"],
        "max_steps": settings["steps"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "max_length": settings["max_len"],
        "bf16": cuda,
        "use_cpu": not cuda,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": settings["seed"],
    }


def vllm(settings: dict[str, Any]) -> Turn:
    """vLLM's offline engine; a turn tells the seconds and the log-probabilities [row][node][token] that make scores.

    For every row and every place where labels part, a request for one token, with the log-probabilities of the tokens
    that may come there (`logprob_token_ids`). Such requests share what they have in common through the prefix cache;
    `prompt_logprobs` would compute it again for each. The cache is emptied before each turn, so that a turn does not
    live on the one before.
    """
    from vllm import LLM, SamplingParams, TokensPrompt

    nodes = settings["nodes"]
    longest = max(map(len, settings["prompts"])) + max(len(node["path"]) for node in nodes)
    engine = LLM(
        model=settings["model"],
        skip_tokenizer_init=True,
        dtype=settings["dtype"],
        enable_prefix_caching=True,
        gpu_memory_utilization=settings["gpu_memory_utilization"],
        max_model_len=longest + 1,
        seed=0,
    )
    ask = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
    asked = [SamplingParams(logprobs=len(node["next"]), logprob_token_ids=node["next"], **ask) for node in nodes]
    requests = [TokensPrompt(prompt_token_ids=row + node["path"]) for row in settings["prompts"] for node in nodes]

    def turn() -> dict[str, Any]:
        if not engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache cannot be emptied")
        started = time.perf_counter()
        outputs = engine.generate(requests, asked * len(settings["prompts"]), use_tqdm=False)
        logprob_of_next = iter([output.outputs[0].logprobs[0] for output in outputs])
        logprobs = [[_of(next(logprob_of_next), node["next"]) for node in nodes] for _ in settings["prompts"]]
        return {"seconds": time.perf_counter() - started, "logprobs": logprobs}

    return turn


def _of(logprobs: dict, tokens: list[int]) -> list[float]:
    return [logprobs[token].logprob for token in tokens]


PEERS = {"unsloth": unsloth, "vllm": vllm}


def python_of(peer: str, given: str | None) -> str | None:
    """The Python that has the peer: the one given, else this one, else None."""
    return given or (sys.executable if importlib.util.find_spec(peer) else None)


class Peer:
    """A peer in its own process, ready once this is made; a context manager that ends it.

    Raises:
        RuntimeError: it failed, with its own words, or ended without a word.
    """

    def __init__(self, python: str, name: str, settings: dict[str, Any]) -> None:
        words = [python, __file__, name]
        self.name = name
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ask(settings)

    def turn(self) -> dict[str, Any]:
        """One turn's answer."""
        return self._ask({})

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or "{}")
        except (BrokenPipeError, ValueError):  # it has ended, perhaps in the middle of a line
            answer = {}
        if "error" in answer or not answer:
            self.__exit__()
            raise RuntimeError(answer.get("error") or f"{self.name} ended without an answer")
        return answer

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # it ends, and what it has started with it
        try:
            self.process.wait(END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def answers(name: str, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """What a peer says to the lines that it reads: that it is ready, turns, or the error that ended it."""
    try:
        turn = PEERS[name](json.loads(next(lines)))
        yield {"ready": True}
        for _ in lines:
            yield turn()
    except Exception as error:
        yield {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # the peer's own prints
        for answer in answers(sys.argv[1], iter(sys.stdin)):
            print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
