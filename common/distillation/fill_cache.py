"""Pass 1 of a distillation from a cache, and how pass 2 reads it: the teacher's distributions, written and batched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common.cli import log
from common.distillation.objective import Reader, predicted
from common.distillation.teacher_cache import TeacherCache, pack, unpack
from common.models.tokenizers import Encoded
from common.training import batches as completions
from common.training import losses as distill_losses

SHARD_TOKENS = 1 << 16  # at most so many are lost when the writing of a cache is interrupted


def collate(batch: Sequence[Encoded], pad_id: int, cache: TeacherCache | None = None) -> dict[str, Any]:
    """`completions.collate`, and under "teacher" what the cache holds of the rows' completion tokens, in their order.

    Rows that it does not hold (those that a run is judged by) get none.
    """
    made = completions.collate(batch, pad_id)
    found = [cache.get(row) for row in batch] if cache else [None]
    if all(packed is not None for packed in found):
        made["teacher"] = {name: torch.from_numpy(array) for name, array in unpack(np.concatenate(found)).items()}
    return made


@torch.no_grad()
def fill_cache(
    cache: TeacherCache,
    teacher: Reader,
    rows: Sequence[Encoded],
    *,
    pad_id: int,
    targets: str,
    temperature: float,
    vocabulary: int,
    layers: Sequence[int],
    max_batch_tokens: int,
    seed: int,
) -> None:
    """Write what the teacher says of `rows` into the cache.

    Args:
        targets: "topk", or "sampled" for draws from the distribution.
        layers: whose hidden states are kept.
    """
    device, k = teacher.model.device, cache.record["low"].shape[0]
    draw = torch.Generator(device).manual_seed(seed)
    rows = sorted(rows, key=lambda row: len(row.input_ids))
    shard: list[Encoded] = []
    packed: list = []

    def outcomes(hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        logprobs = distill_losses.log_probs(teacher.logits(hidden)[:, :vocabulary], temperature)
        if targets == "sampled":
            draws = torch.multinomial(logprobs.exp(), k, replacement=True, generator=draw)
            return {"ids": draws, "rest": -(logprobs.exp() * logprobs).sum(dim=-1)}
        top, ids = logprobs.topk(k)
        return {"ids": ids, "rest": (1 - top.exp().sum(dim=-1)).clamp(min=0), "logprobs": top}

    def flush() -> None:
        if shard:
            cache.add(shard, np.concatenate(packed))
            shard.clear(), packed.clear()

    size = max(1, distill_losses.CHUNK_LOGITS // teacher.head.weight.shape[0])
    with tqdm(total=len(rows), unit=" rows", desc="teacher") as progress:
        while rows:
            batch_rows = [rows.pop()]
            while rows and (len(batch_rows) + 1) * len(batch_rows[0].input_ids) <= max_batch_tokens:
                batch_rows.append(rows.pop())
            batch = {name: tensor.to(device) for name, tensor in completions.collate(batch_rows, pad_id).items()}
            reading, mask = teacher.read(teacher.model, batch), predicted(batch)
            last = reading.last[:, :-1][mask]
            parts = [outcomes(last[start : start + size]) for start in range(0, len(last), size)]
            found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            if layers:
                found["hidden"] = reading.hidden_at(mask, layers)
            packed.append(pack(cache.record, **{name: tensor.cpu().float().numpy() for name, tensor in found.items()}))
            shard += batch_rows
            if sum(map(len, packed)) >= SHARD_TOKENS:
                flush()
            progress.update(len(batch_rows))
        flush()
    sizes = cache.sizes()
    log(
        f"teacher cache {cache.folder}: {sizes['rows']:,} rows, {sizes['tokens']:,} tokens, {sizes['bytes']:,} bytes, "
        f"{sizes['bytes_per_token']} a token"
    )
