"""What lets a miniature learn to copy from its prompt within minutes, as IDP asks of it: heads, tokens and exercises.

To write down a field is to find where it stands and to go on from there token by token. Heads that do so, induction
heads (Olsson et al. 2022, arXiv:2209.11895), come late in training; here they are put in place and trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.training.miniature import SelfSupervision

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2ForCausalLM

HEAD_SIZE = 32
JSON_KEY = re.compile(r'"(\w+)":')
SPANS = 3  # in an exercise
EMBEDDINGS, SHARPNESS, MATCH, PREVIOUS, FOLLOWING = 0.1, 5.0, 2.0, 0.1, 1.0  # scales of what is put in place
SLOW = 0.05  # radians a token: what turns faster tells positions, what turns slower can be compared at a distance


def tokens(prompts: Sequence[str]) -> list[str]:
    """Texts to make tokens of: the frame of all prompts, the JSON keys in it, and pairs of digits.

    With pairs a number has half as many tokens, and each is found in fewer places.
    """
    frame = frame_of(prompts)
    keys = dict.fromkeys(f'"{key}":' for key in JSON_KEY.findall(frame))
    return [*([frame] if frame else []), *keys, *(f"{number:02}" for number in range(100))]


def frame_of(prompts: Sequence[str]) -> str:
    """The lines that all prompts start with."""
    first, last = min(prompts), max(prompts)  # in alphabetical order: what they share, all share
    shared = next((index for index, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("\n", 0, shared) + 1]


class CopyExercises(SelfSupervision):
    """Unlabelled prompts as exercises: of a part of the document, some spans as JSON, each with what follows it."""

    learn_prompts = False  # names and amounts cannot be foreseen

    def __init__(self, prompts: Sequence[str], seed: int) -> None:
        super().__init__(prompts, seed)
        self.frame = frame_of(prompts)
        self.cuts, self.fields = {}, []

    def example(self, prompt: str) -> tuple[str, str]:
        """(the prompt with a part of its document, three of its spans).

        The schema's own keys are left out: drawn at random, they would become one and the same to the model.
        """
        words = re.findall(r"\s*\S+", prompt.removeprefix(self.frame))
        length = self.rng.randint(min(6, len(words)), len(words))
        start = self.rng.randint(0, len(words) - length)
        words = words[start : start + length]
        spans = {}
        for _ in range(SPANS):
            start = self.rng.randrange(len(words))
            middle = start + self.rng.randint(1, 2)
            end = middle + self.rng.randint(2, 6)
            spans["".join(words[start:middle]).strip()] = "".join(words[middle:end]).strip()
        return self.frame + "".join(words), json.dumps(spans, ensure_ascii=False, separators=(",", ":"))


def place_heads(model: Qwen2ForCausalLM, seed: int) -> None:
    """Put induction heads into a model of random weights, for two tokens of context.

    At first the embeddings take half of the residual stream. In the first layer, heads look one token back (the first
    half of them) or two (the second half), by their position alone, and write what stands there into the other half.
    In the second layer, a head compares the token and the one before it with the two tokens before each other place,
    and writes the token of the place where they agree over the embedding: what follows is what followed there.
    """
    import torch

    config, generator = model.config, torch.Generator().manual_seed(seed)
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    size, own, per = config.hidden_size // heads, config.hidden_size // 2, heads // config.num_key_value_heads
    width = own // 2  # of the room for one token back, and for two
    turn = model.model.rotary_emb.inv_freq
    slow = (turn < SLOW).repeat(2)[:, None]
    first, second = (layer.self_attn for layer in model.model.layers[:2])

    def directions(rows: int, columns: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0][:rows]

    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings *= EMBEDDINGS / config.initializer_range
        embeddings[:, own:] = 0
        for layer in (first, second):
            for part in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
                part.weight.zero_()
        short, following = directions(width, own), directions(groups * size, own)
        for group in range(groups):
            keys = slice(group * size, (group + 1) * size)
            back, index = divmod(group, groups // 2)
            part = short[index * size : (index + 1) * size]
            room = slice(own + back * width + index * size, own + back * width + index * size + len(part))
            first.v_proj.weight[keys, :own] = part
            first.k_proj.bias[keys] = SHARPNESS * torch.cat([torch.ones_like(turn), torch.zeros_like(turn)])
            mix = [MATCH / width**0.5 * torch.randn(size, width, generator=generator) * slow for _ in range(2)]
            second.k_proj.weight[keys, own : own + width] = mix[0]
            second.k_proj.weight[keys, own + width :] = mix[1]
            second.v_proj.weight[keys, :own] = following[keys]
            for head in range(group * per, (group + 1) * per):
                rows = slice(head * size, (head + 1) * size)
                angle = (back + 1) * turn
                first.q_proj.bias[rows] = SHARPNESS * torch.cat([angle.cos(), -angle.sin()])
                first.o_proj.weight[room, rows] = PREVIOUS / per * torch.eye(size)
                second.q_proj.weight[rows, :own] = mix[0] @ short
                second.q_proj.weight[rows, own : own + width] = mix[1]
                second.o_proj.weight[:own, rows] = FOLLOWING / per * following[keys].T
