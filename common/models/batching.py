"""How much goes through a model at a time, wherever it is trained, asked or predicted."""

MAX_BATCH_TOKENS = 8192  # of a batch to score or to write for
CPU_BATCH_TOKENS = 2048  # where a CPU is fastest: what passes between layers still fits its caches (docs/results.md)
LOGITS_AT_ONCE = 1 << 24  # rows x scored columns x vocabulary of a batch of labels, unless one row has more
KEPT_TOKENS = 512  # of prefixes whose keys and values are kept
REFERENCE_TOKENS = 2048  # of a batch that DPO's reference scores before training
CHUNK_LOGITS = 1 << 26  # of a distillation loss: 256 MB in float32
EFFECTIVE_BATCH = 16  # rows an optimizer step, unless flags say otherwise
CPU_TOKENS_PER_BATCH = 16_384  # of a training batch on a CPU
