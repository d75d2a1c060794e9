"""The peak memory of training and inference as formulas of the model's shape and of the settings that decide it.

The peak of a training step is one of two moments: the loss (all that the layers keep, and the logits with their
gradients) or the backward pass of a layer (all that the layers keep, and that layer's work). What a layer keeps is
counted tensor by tensor in `kept_by_layer`. Everything is in bytes; GB are 1e9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from common.models.batching import CHUNK_LOGITS, KEPT_TOKENS, LOGITS_AT_ONCE, MAPS_AT_ONCE, REFERENCE_TOKENS
from common.vram.model_shape import ModelShape

GB = 1e9
FLOAT32, BFLOAT16, BOOL = 4, 2, 1
BLOCK, NESTED_BLOCK = 64, 256  # weights a constant of NF4, constants a constant of those: bitsandbytes' defaults
HEAD_TOKENS, HEAD_LOGITS = 4096, 32_768  # of a tile of TRL's fused LM head, for DPO
ROW_TOKENS = 256  # of a row to score
GGUF_AT_ONCE = 512  # tokens of a pass in llama.cpp
GGUF_TOKEN = 600  # bytes of a token in llama.cpp's tokenizer, about (measured)

# What the allocator does not see. NVIDIA's driver keeps a context for each process that uses the card, and loads the
# kernels of torch, cuBLAS and bitsandbytes into it as they are first used; sizes differ with card and driver, and
# these are the round figures that are commonly seen, not measured here.
CUDA_CONTEXT = 300e6
CUDA_KERNELS = 200e6
PROCESS = 600e6  # on a CPU: Python, torch, transformers and peft, imported (resident, measured)


@dataclass(frozen=True)
class Prediction:
    """Parts of the peak, by name, in bytes."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of the whole process on its device."""
        return sum(self.parts.values())

    @property
    def tensors(self) -> int:
        """Bytes of the tensors alone: what torch.cuda.max_memory_allocated() is to be compared with."""
        return self.total - self.parts["runtime"]

    def table(self) -> str:
        """One line a part, and the total."""

        def line(name: str, size: int) -> str:
            return f"{name:28} {size / GB:6.2f} GB" if size >= GB / 100 else f"{name:28} {size / 1e6:6.2f} MB"

        return "\n".join(line(name, size) for name, size in [*self.parts.items(), ("predicted peak", self.total)])


@dataclass(frozen=True)
class Training:
    """What decides the peak of a training step; the defaults are the recipe's on a card."""

    student: ModelShape
    method: str = "sft"  # sft, kd, dpo or distill
    max_len: int = 1024  # tokens a row
    batch: int = 1  # rows (DPO: pairs) on the device at a time
    completion_len: int | None = None  # the longest completion, tokens; None: it could be the whole row
    lora_r: int = 16  # 0: all weights are trained, in float32
    lora_dropout: float = 0.05
    four_bit: bool = True
    checkpointing: bool = True
    cuda: bool = True
    bfloat16: bool = False  # on a CPU: the base lies in it
    by_hand: bool = False  # on a CPU: the adapter has the backward pass that a large base gets
    rounds: bool = False  # all weights are trained, and rounded in the forward pass (`quantization_aware`)
    reference: bool = False  # of dpo: beside the adapter there is a copy of it as it was
    terms: tuple[str, ...] = ("forward_kl",)  # of distill
    teacher: ModelShape | None = None  # of distill: one that is on the device, too
    teacher_four_bit: bool = True

    @property
    def rows(self) -> int:
        return self.batch * (2 if self.method == "dpo" else 1)

    @property
    def tokens(self) -> int:
        return self.rows * self.max_len

    @property
    def columns(self) -> int:
        """Scored positions of all rows."""
        return self.rows * min(self.completion_len or self.max_len, self.max_len)

    @property
    def padded(self) -> bool:
        """Rows of unlike lengths need a mask; a single row needs none, and its keys are shared by the heads as is."""
        return self.rows > 1

    @property
    def maps(self) -> bool:
        """Attention maps are compared, so both models use eager attention and hand all maps out."""
        return self.method == "distill" and "attention_mse" in self.terms

    @property
    def states(self) -> bool:
        """Hidden states of layers are compared, so both models hand them all out."""
        return self.method == "distill" and not {"hidden_mse", "hidden_cosine"}.isdisjoint(self.terms)

    @property
    def as_tree(self) -> bool:
        """Batches are prefix trees: attention and head have backward passes of their own, too."""
        teacher = self.teacher is None or (self.teacher.reads_prefix_trees and self.teacher.large)
        return self.by_hand and self.student.reads_prefix_trees and teacher and not self.maps

    @property
    def rounded(self) -> int:
        """Bytes that one layer keeps of its matrices' rounding: each divided by its scale, and rounded."""
        linear = sum(inputs * outputs for inputs, outputs in self.student.projections)
        return 2 * FLOAT32 * linear if self.rounds else 0

    @property
    def full(self) -> bool:
        return self.lora_r == 0

    @property
    def stream(self) -> int:
        """Bytes of an element that passes from matrix to matrix."""
        return BFLOAT16 if self.cuda or self.four_bit or self.bfloat16 else FLOAT32

    @property
    def residual(self) -> int:
        """Bytes of an element between the layers: as the weights of embedding and norms."""
        return FLOAT32 if self.full else self.stream

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return sum(self.student.parameters().values()) if self.full else self.student.lora_parameters(self.lora_r)

    @property
    def trained_width(self) -> int:
        """Bytes of one of them, of its gradient, and of each of its two moments; TRL casts a DPO adapter on 4 bits."""
        return BFLOAT16 if self.method == "dpo" and self.four_bit else FLOAT32

    @property
    def casts(self) -> int:
        """Bytes of autocast's copies of what is trained."""
        return self.trained * BFLOAT16 if self.cuda and self.trained_width == FLOAT32 else 0


@dataclass(frozen=True)
class Inference:
    """What decides the peak of scoring or generating, without gradients."""

    model: ModelShape
    batch_tokens: int = 8192  # in one forward pass, and in its key/value cache
    generates: bool = True  # text, and so keeps keys and values of all layers; ranking labels needs one layer's
    logits: int = LOGITS_AT_ONCE  # made at a time
    adapters: int = 1  # loaded together, one active
    lora_r: int = 16
    four_bit: bool = True
    width: int = BFLOAT16  # bytes of a weight that is not in 4 bits, and of what passes through
    cuda: bool = True
    offload: bool = False  # layers wait in CPU memory or on the disk
    packs: bool = False  # its weights, for a CPU (`common.models.packed_weights`), which leaves the head there twice


@dataclass(frozen=True)
class Packed:
    """What decides the peak of a GGUF that llama.cpp runs as it is, on the CPU, whatever card there is."""

    model: ModelShape
    file_bytes: int
    batch_tokens: int = 8192  # of the texts that are written together, and of a row that is ranked
    writes: bool = True
    ranks: bool = True
    cuda: bool = False


Plan = Training | Inference | Packed


def nf4_bytes(weights: int) -> int:
    """A matrix of so many weights in NF4 with double quantisation, as bitsandbytes stores it (QLoRA, section 3).

    Half a byte a weight, one byte a block of 64 (its scale), a float32 for 256 of those, their mean, and two tables.
    """
    blocks = -(-weights // BLOCK)
    return -(-weights // 2) + blocks + FLOAT32 * (-(-blocks // NESTED_BLOCK) + 1 + 16 + 256)


def weight_bytes(shape: ModelShape, *, four_bit: bool, width: int) -> int:
    """All weights: matrices of the layers in NF4 where `four_bit`, everything else in `width` bytes each."""
    counts = shape.parameters()
    linear = counts.pop("linear")
    rest = sum(counts.values()) * width
    if not four_bit:
        return linear * width + rest
    return shape.layers * sum(nf4_bytes(inputs * outputs) for inputs, outputs in shape.projections) + rest


def kept_by_layer(plan: Training) -> float:
    """Bytes a token that one decoder layer keeps for its backward pass, in `common.training.losses.completion_loss`.

    By autograd's own list (torch.autograd.graph.saved_tensors_hooks) these are, with d hidden, q and k the widths of
    queries and keys, f intermediate:
    - both RMSNorms: their input in float32 (d) and its scale; where norms are trained, the normed input (d), too; by
      hand (`norm_training`) their input as it is.
    - what LoRA's A multiplies: the input of each of the seven projections after dropout, with dropout's mask, and A's
      result. A frozen matrix keeps nothing. Without dropout q, k and v share one input, as do gate and up, and o's is
      the attention's output; unless it has to be cast to another type, which makes copies again.
    - SDPA: queries, keys and values, the output and a log-sum-exp a head. With padding keys and values are repeated
      for every head, and each layer turns the mask into numbers (a row of max_len for each token).
    - the MLP: gate and up, and SiLU's result.
    Where weights are rounded, so is the input of each projection, which is kept beside the input itself.
    Eager attention keeps its map, in float32 and in the type it goes on with.
    By hand (`lora_training`) the adapter keeps the input that all matrices that read it share; the attention of a
    `prefix_tree` keeps its queries, keys and values, besides the output, which o's adapter keeps anyway.
    """
    shape, element = plan.student, plan.stream
    d, q, f = shape.hidden, shape.query, shape.intermediate
    norms = 2 * FLOAT32 * (d + 1)
    if plan.full:
        norms += 2 * d * plan.residual
        separate, per_input = plan.cuda, element  # autocast casts the input once a matrix
    elif plan.by_hand:
        separate, per_input = False, element
        norms = 2 * (d * element + FLOAT32) + 7 * plan.lora_r * element
    else:
        in_adapter = BFLOAT16 if plan.cuda else FLOAT32  # autocast; without it LoRA casts to its own type
        mask = (BOOL if plan.cuda else in_adapter) if plan.lora_dropout else 0  # a CPU keeps it as numbers
        separate = bool(plan.lora_dropout) or (plan.cuda and not plan.four_bit) or in_adapter != element
        per_input = in_adapter + mask
        norms += 7 * plan.lora_r * in_adapter  # A's results
    inputs = (5 * d + (q if not plan.full else 0) if separate else 2 * d) + f
    inputs += 5 * d + q + f if plan.rounds else 0
    if plan.as_tree:
        return norms + inputs * per_input + (2 * q + 2 * shape.key + 3 * f) * element
    attention = (3 * q if plan.padded else q + 2 * shape.key) + q + (plan.max_len if plan.padded else 0)
    maps = plan.max_len * (FLOAT32 + (element if element != FLOAT32 else 0)) if plan.maps else FLOAT32
    return norms + inputs * per_input + (attention + 3 * f) * element + shape.heads * maps


def layer_work(plan: Training) -> float:
    """Bytes beyond what is kept while the last layer goes backward, or, checkpointed, is made again and goes backward.

    The MLP's last projection is where it is largest: the gradients of its input (f), of the residual and of its result
    (d). Without dropout, and where the matrix itself is trained, its input's gradient is a sum of two and the two are
    there, too. Making the layer again holds the normed input and the adapter's result besides. Where LoRA has to cast
    its input, there is a float32 copy of that. To round the last projection's input takes it apart in seven. 4-bit
    weights are unpacked to bfloat16, a matrix at a time; weights that are trained get a gradient of their own first.
    """
    shape = plan.student
    d, f = shape.hidden, shape.intermediate
    if plan.by_hand:
        maps = min(MAPS_AT_ONCE, plan.tokens * shape.heads * plan.max_len) if plan.as_tree else 0
        return max(plan.tokens * (3 * f + 2 * d) * plan.stream, maps * 3 * plan.stream)
    if plan.lora_dropout and not plan.full:
        work = (f + (4 if plan.checkpointing else 2) * d) * plan.stream
        work += f * FLOAT32 if plan.stream == BFLOAT16 and not (plan.cuda and plan.four_bit) else 0
    else:
        work = (7 * f if plan.rounds else 2 * f + 2 * d) * plan.stream
    largest = max(inputs * outputs for inputs, outputs in shape.projections)
    return plan.tokens * work + largest * (FLOAT32 if plan.full else BFLOAT16 if plan.four_bit else 0)


def loss_work(plan: Training) -> float:
    """Bytes of the logits at their largest: those of the completions alone, in float32.

    Cross-entropy's backward pass holds three of each: the log-softmax, its gradient and the logit's. A divergence from
    a live teacher holds six (measured, with its small change: six and a half), the generalised Jensen-Shannon one ten,
    one from a cached teacher's few outcomes three; cross-entropy beside them adds one. Distillation makes its logits in
    chunks.
    """
    shape = plan.student
    if plan.method == "dpo":
        return fused_head(plan, plan.tokens, copies=7.25) + plan.columns * shape.hidden * FLOAT32
    logits, copies = plan.columns * shape.vocabulary, 3
    if plan.as_tree and plan.method != "distill":
        # logits and, within logsumexp, their exponentials; hidden states of the scored tokens and their gradients
        return min(logits, CHUNK_LOGITS) * 2 * FLOAT32 + 2 * plan.columns * shape.hidden * plan.stream
    if plan.method == "distill":
        logits = min(logits, CHUNK_LOGITS)
        if plan.teacher and {"forward_kl", "reverse_kl", "jsd"} & set(plan.terms):
            copies = 10.5 if "jsd" in plan.terms else 6.5
        copies += len(plan.terms) > 1
    head = shape.vocabulary * shape.hidden if plan.full else 0  # the head's gradient follows the logits' alone
    return max(copies * logits, logits + head) * FLOAT32


def fused_head(plan: Training, tokens: int, copies: float) -> float:
    """Bytes of TRL's fused LM head: one tile of logits and the scored hidden states.

    On a card it scores completions alone. A CPU scores all tokens, and its torch operations hold float32 `copies` of
    the tile: three going forward, seven and a boolean mask going backward.
    """
    shape = plan.student
    scored = tokens if not plan.cuda else tokens * plan.columns // plan.tokens
    in_tile = min(scored, HEAD_TOKENS)
    work = 0 if plan.cuda else in_tile * min(shape.vocabulary, HEAD_LOGITS) * copies * FLOAT32
    return work + in_tile * HEAD_LOGITS * plan.stream + scored * shape.hidden * plan.stream


def reference_work(plan: Training) -> float:
    """Bytes of DPO's reference pass, which comes before there are gradients and moments."""
    tokens = max(plan.tokens, REFERENCE_TOKENS)
    reading = Inference(plan.student, tokens, four_bit=plan.four_bit, width=plan.stream)
    return max(layer_forward(reading), fused_head(plan, tokens, copies=3))


def teacher_work(plan: Training) -> float:
    """Bytes of a live teacher's forward pass, beside its weights: one layer's work, and what is compared."""
    teacher = plan.teacher
    width = BFLOAT16 if plan.cuda or plan.teacher_four_bit else FLOAT32
    reading = Inference(teacher, plan.tokens, adapters=0, four_bit=plan.teacher_four_bit, width=width)
    maps = teacher.layers * teacher.heads * plan.tokens * plan.max_len if plan.maps else 0
    states = (teacher.layers + 1) * plan.tokens * teacher.hidden if plan.states else 0
    return layer_forward(reading) + (states + maps) * width


def kept(plan: Training) -> float:
    """Bytes that wait for the backward pass: of all layers what each keeps, or checkpointed its input alone."""
    shape = plan.student
    if plan.checkpointing:
        size = shape.layers * plan.tokens * shape.hidden * plan.residual
        size += shape.layers * shape.heads * plan.tokens * plan.max_len * plan.stream if plan.maps else 0
    else:
        size = shape.layers * (plan.tokens * kept_by_layer(plan) + plan.rounded) + plan.casts
    size += plan.max_len * shape.head_dim * 2 * plan.residual  # cosines and sines
    size += plan.tokens * plan.max_len * BOOL if plan.padded else 0  # the mask
    if plan.states and plan.cuda:  # mixed precision turns what a model hands out into float32
        size += (shape.layers + 1) * plan.tokens * shape.hidden * FLOAT32
    return size


def moments(plan: Training) -> dict[str, float]:
    """Bytes of each moment that can be the peak, beside weights, what is learnt, and what is `kept`."""
    d, tokens = plan.student.hidden, plan.tokens
    loss = loss_work(plan) + tokens * FLOAT32 * (d + 1)  # what the last norm keeps
    layer = layer_work(plan)
    if plan.checkpointing:
        layer += tokens * kept_by_layer(plan) + plan.rounded + plan.casts / plan.student.layers
        layer -= tokens * d * FLOAT32 if plan.residual == FLOAT32 else 0  # its input is the checkpoint itself
    else:  # the last norm's backward pass: six tensors of its width, and what it keeps
        loss = max(loss, tokens * FLOAT32 * (7 * d + 1))
    sizes = {"loss": loss, "a layer's backward pass": layer}
    if plan.teacher:
        sizes["the teacher's forward pass"] = teacher_work(plan)
    if plan.method == "dpo":  # when nothing is learnt and kept yet
        sizes["the reference's pass"] = reference_work(plan) - 3 * plan.trained * plan.trained_width - kept(plan)
    return sizes


def predict_training(plan: Training) -> Prediction:
    """The peak of a training step in the middle of a run, when gradients and AdamW's moments exist."""
    teacher, learnt = plan.teacher, plan.trained * plan.trained_width
    peak = moments(plan)
    largest = max(peak, key=peak.get)
    parts = {
        "student's weights": weight_bytes(plan.student, four_bit=plan.four_bit and not plan.full, width=plan.residual),
        "teacher's weights": teacher
        and weight_bytes(teacher, four_bit=plan.teacher_four_bit, width=BFLOAT16 if plan.cuda else FLOAT32),
        "gradients, AdamW" if plan.full else "adapter, gradients, AdamW": (3 if plan.full else 4 + plan.reference)
        * learnt,
        "activations kept": kept(plan),
        largest: peak[largest],
    }
    return _prediction(parts, plan.cuda)


def layer_forward(plan: Inference) -> float:
    """Bytes that a layer takes for its forward pass at its largest moment.

    That is the MLP's product: SiLU's result, the second matrix's (an adapter adds in place, see
    `common.models.lora_inference`) and theirs, each f wide; before it, in models with a narrow MLP, the attention's
    nine tensors of the hidden width.
    """
    shape, width = plan.model, plan.width
    d, f = shape.hidden, shape.intermediate
    largest = max(inputs * outputs for inputs, outputs in shape.projections)
    return plan.batch_tokens * max(3 * f + 5 * d, 9 * d) * width + largest * BFLOAT16 * plan.four_bit


def predict_inference(plan: Inference) -> Prediction:
    """The peak of the forward pass of a batch, one layer's work at a time.

    Ranking labels, a layer has its own keys and values alone, beside those of all layers for the prefixes at hand, the
    mask, and one more tensor of the hidden width. Generating, the keys and values of all layers stay.
    """
    shape, width, tokens = plan.model, plan.width, plan.batch_tokens
    a_token = 2 * shape.key * width  # of a layer's keys and values
    logits = 2 * FLOAT32 * min(plan.logits, tokens * shape.vocabulary)
    prefixes = KEPT_TOKENS * shape.layers * max(1, plan.adapters)
    work = layer_forward(plan)
    passes = [((tokens + prefixes) * a_token, max(work, logits) + tokens * ROW_TOKENS * BOOL)]
    if plan.generates:
        passes.append((tokens * shape.layers * a_token, max(work - tokens * shape.hidden * width, logits)))
    cached, forward = max(passes, key=sum)
    weights = weight_bytes(shape, four_bit=plan.four_bit, width=width)
    if plan.offload:  # what does not fit waits elsewhere: at the least the embeddings and one layer are there
        one_layer = replace(shape, layers=1)
        weights = weight_bytes(one_layer, four_bit=plan.four_bit, width=width)
    if plan.packs:
        weights += shape.vocabulary * shape.hidden * width
    return _prediction(
        {
            "weights": weights,
            "adapters": plan.adapters * shape.lora_parameters(plan.lora_r) * width,
            "key/value cache": cached,
            "a forward pass": forward,
        },
        plan.cuda,
    )


def predict_packed(plan: Packed) -> Prediction:
    """The peak of a GGUF: the file, which is mapped, the keys and values of texts and of a row in 16 bits, and a pass.

    A pass is of `GGUF_AT_ONCE` tokens, in float32. Of a 0.5B model of 469 MiB, for texts and a row of 8,192 tokens, 822
    MiB are predicted beside the libraries; 840 were resident.
    """
    shape = plan.model
    a_token = 2 * shape.key * shape.layers * BFLOAT16
    row = min(plan.batch_tokens, shape.context)
    width = max(3 * shape.intermediate + 5 * shape.hidden, 9 * shape.hidden)
    contexts = plan.writes + plan.ranks
    parts: dict[str, float] = {
        "the GGUF": plan.file_bytes,
        "its vocabulary": GGUF_TOKEN * shape.vocabulary,
        "key/value cache": a_token * (plan.batch_tokens * plan.writes + row * plan.ranks),
        "a forward pass": contexts * GGUF_AT_ONCE * width * FLOAT32,
    }
    return _prediction(parts, plan.cuda)


def predict(plan: Plan) -> Prediction:
    """`predict_training`, `predict_inference` or `predict_packed`."""
    if isinstance(plan, Packed):
        return predict_packed(plan)
    return predict_training(plan) if isinstance(plan, Training) else predict_inference(plan)


def _prediction(parts: dict[str, float], cuda: bool) -> Prediction:
    parts = parts | {"runtime": runtime_bytes(cuda)}
    return Prediction({name: round(size) for name, size in parts.items() if size})


def runtime_bytes(cuda: bool) -> int:
    """What a process holds besides tensors: of the card the driver's part, else the libraries."""
    return int(CUDA_CONTEXT + CUDA_KERNELS if cuda else PROCESS)
