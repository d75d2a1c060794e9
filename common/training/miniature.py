"""The offline miniature: Qwen2 architecture, byte-level BPE with single digits, pretrained on unlabelled prompts."""

from __future__ import annotations

import functools
import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import quantiles
from typing import TYPE_CHECKING

from common.models import loading

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def build_tokenizer(prompts: Sequence[str], vocab_size: int, phrases: Sequence[str] | None = None) -> Qwen2Tokenizer:
    """Qwen2's own tokenizer (byte-level BPE, digits single) trained on `prompts`, with its turn tokens and ChatML.

    `phrases` become one added token each; by default they are the fixed text between the numbers of a prompt, so that a
    row costs little more than its digits. Added tokens survive every loader and export; merges across words would not,
    since the tokenizer that transformers builds for this architecture splits words before it merges.
    """
    from transformers import AddedToken, Qwen2Tokenizer

    frame = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    if phrases is None:
        pieces = Counter(piece for prompt in prompts for piece in NUMBER.split(prompt) if len(piece) > 4)
        phrases = [piece for piece, count in pieces.most_common(MOST_PHRASES) if count >= len(prompts) * PHRASE_SHARE]
    words = [f"{word}\n {word}\n" for word in ANSWER_WORDS] * len(prompts)  # one token each, with a space or without
    blank = Qwen2Tokenizer(vocab={}, merges=[], unk_token=END_OF_TEXT, eos_token=TURN_END, pad_token=END_OF_TEXT)
    tokenizer = blank.train_new_from_iterator(
        [*prompts, *words],
        vocab_size - len(frame) - len(phrases),
        new_special_tokens=[TURN_START, TURN_END],
        show_progress=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in [*frame, *phrases]])
    return tokenizer


def build_model(
    tokenizer: Qwen2Tokenizer,
    *,
    hidden: int,
    layers: int,
    heads: int,
    seed: int,
    context: int = 2048,
) -> Qwen2ForCausalLM:
    """A Qwen2 model of random weights: grouped-query attention, tied embeddings, as in Qwen2.5-3B."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, do_sample=False
    )
    return model


NUMBER = re.compile(r"\d+(?:\.\d+)?")
MOST_PHRASES, PHRASE_SHARE = 256, 0.002  # fixed texts that become tokens: how many at most, how often at least
LEVELS = 32  # equal shares of a field's values, one of which a number is to be recognised as
ANSWER_WORDS = ("Good", "Standard", "Bad", "Low", "Medium", "High", "Yes", "No")
SAY = "Say this word: "
NUMBER_FIELD = re.compile(r"([A-Z][\w /.()-]*): (-?\d+(?:\.\d+)?)(?=, |$)", re.MULTILINE)
KEYWORDS = "Write a text with these: "
# A tag, a bullet, a quoted word, a word or number, an operator.
WORD = re.compile(r"</?\w+>|^ *- |'[^'\n]*'|\w+|[^\w\s'\"()\[\]{},.:;]+", re.MULTILINE)
KEYWORD_SHARE = 0.15  # of the texts: a word in more of them says little
RARE_SHARE = 0.004  # of the texts: a word in fewer of them is a name
TEXT_VARIANTS = 3  # of each text
UNKNOWN = -100  # the level of a field that a prompt has no number for


class SelfSupervision:
    """What a model can learn from unlabelled prompts: their text, an answer that is a random word or a copied span, and
    how large each of their numbers is for its field; and from texts without prompts: to write one from its keywords.

    Attributes:
        fields: the numeric fields, in the order of their first appearance.
        learn_prompts: whether the text of the prompt is learnt too, or the answer alone.
    """

    learn_prompts = True

    def __init__(self, prompts: Sequence[str], seed: int, texts: Sequence[str] = ()) -> None:
        self.rng = random.Random(seed)
        self.texts = {prompt: text for _ in range(TEXT_VARIANTS) for prompt, text in keyword_prompts(texts, self.rng)}
        self.prompts = [*prompts, *self.texts]
        values: dict[str, list[float]] = {}
        for prompt in self.prompts:
            for field, number in NUMBER_FIELD.findall(prompt):
                values.setdefault(field, []).append(float(number))
        self.cuts = {field: quantiles(v, n=LEVELS) for field, v in values.items() if len(set(v)) >= 2 * LEVELS}
        self.fields = list(self.cuts)

    def levels(self, prompt: str) -> list[int]:
        """For each of `fields` the share (0 to LEVELS - 1) that the prompt's number falls into, or UNKNOWN."""
        numbers = dict(NUMBER_FIELD.findall(prompt))
        return [
            bisect_right(cuts, float(numbers[field])) if field in numbers else UNKNOWN
            for field, cuts in self.cuts.items()
        ]

    def example(self, prompt: str) -> tuple[str, str]:
        """(prompt, answer) to learn from one of `prompts`."""
        return prompt, self.answer(prompt)

    def answer(self, prompt: str) -> str:
        """A random answer word; for a prompt without numeric fields a span of itself, to learn copying from; for the
        keywords of a text that text.

        Words that are only ever drawn at random would become one and the same to the model, and no adapter could tell
        them apart through a frozen head; saying the word that was asked for keeps them distinct.
        """
        if prompt in self.texts:
            return self.texts[prompt]
        if prompt.startswith(SAY):
            return prompt.removeprefix(SAY)
        if any(f"{field}: " in prompt for field in self.fields):
            return self.rng.choice(ANSWER_WORDS)
        words = prompt.split(" ")
        start = self.rng.randrange(len(words))
        return " ".join(words[start : start + 6])


def keyword_prompts(texts: Sequence[str], rng: random.Random) -> Iterator[tuple[str, str]]:
    """(a prompt with the keywords of a text, the text) for each, a form of denoising (Lewis et al. 2019, BART).

    First its numbers, its quoted words and its rare names are exchanged for those of other texts, the same for the
    same: what a text says can then only be copied from its keywords, not remembered.
    """
    counts = Counter(word for text in texts for word in set(WORD.findall(text)))
    pools = [
        sorted(word for word in counts if kind(word))
        for kind in (
            str.isdigit,
            lambda word: word.startswith("'"),
            lambda word: word.isidentifier() and counts[word] < RARE_SHARE * len(texts),
        )
    ]
    pool_of = {word: pool for pool in pools for word in pool}
    for text in texts:
        other = {word: rng.choice(pool_of[word]) for word in WORD.findall(text) if word in pool_of}
        text = WORD.sub(lambda match, other=other: other.get(match[0], match[0]), text)
        words = dict.fromkeys(WORD.findall(text))
        yield KEYWORDS + " ".join(word for word in words if counts[word] < KEYWORD_SHARE * len(texts)), text


def other_prompts(count: int, seed: int) -> list[str]:
    """Made-up prompts: half ask for a word to be said, the rest are like IDP's and CodeGen's, so that the miniature
    has seen the other two tasks' kind of text."""
    rng = random.Random(seed)
    companies = ("Acme Co.", "Bar LLC", "Foo Ltd.", "Globex Inc.", "Initech GmbH", "Umbrella AG")
    goods = ("USB-C Cable", "65W Charger", "Desk Lamp", "Paper A4", "Coffee Beans", "Notebook")
    verbs = ("returns the sum of", "sorts", "reverses", "counts the words of", "finds the largest of", "filters")
    things = ("a list of numbers", "a string", "two integers", "the rows of a table", "a dictionary's keys")
    prompts = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.5:
            prompts.append(SAY + rng.choice(ANSWER_WORDS))
        elif kind < 0.75:
            date = f"{rng.randint(2020, 2026)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
            item = f"{rng.choice(goods)} x{rng.randint(1, 9)}"
            total = f"{rng.choice(('USD', 'EUR', 'INR'))} {rng.randint(1, 9999)}.{rng.randint(0, 99):02}"
            company = rng.choice(companies)
            prompts.append(f"Invoice #INV-{rng.randint(1, 999)} dated {date} from {company}. {item}. Total: {total}")
        else:
            name = "".join(rng.choices("abcdefgh", k=4))
            prompts.append(f"Write a function {name} that {rng.choice(verbs)} {rng.choice(things)}.")
    return prompts


def muon(matrices: Sequence[torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """torch's Muon where this machine's CPU multiplies bfloat16, and else the same in float32."""
    import torch

    from common.training.muon import Float32Muon

    kind = torch.optim.Muon if loading.has_bfloat16() else Float32Muon
    return kind(matrices, lr=learning_rate, momentum=0.95, weight_decay=0.01)


def pretrain(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    source: SelfSupervision,
    *,
    steps: int,
    rows_per_step: int,
    learning_rate: float,
) -> dict[str, float]:
    """Train all weights as a language model that also knows, where its answer starts, how large the numbers are.

    The loss is cross-entropy over every token plus, at the last token of the prompt, that of a linear head on the last
    two layers' inputs which names each number's level. The head is thrown away: what remains is a base whose hidden
    state holds what the numbers say, and whose answers are random words.

    Matrices are trained by Muon (Jordan et al. 2024: momentum, orthogonalised), which here needed under a third of
    AdamW's steps; embeddings and norms by AdamW at a sixth of its learning rate.

    Returns:
        Mean losses of the last tenth of the steps, in nats: "language_model" a token, "levels" a number.
    """
    import torch
    from tqdm import trange

    from common.models import tokenizers

    head = torch.nn.Linear(2 * model.config.hidden_size, max(1, len(source.fields)) * LEVELS)
    encode = functools.cache(functools.partial(tokenizers.encode_prompt, tokenizer))
    losses = functools.partial(_pretraining_losses, head, tokenizer, source, encode)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        muon(hidden, learning_rate),
        torch.optim.AdamW([*others, *head.parameters()], lr=learning_rate / 6, betas=(0.9, 0.95), fused=True),
    ]

    def rate(step: int) -> float:  # warm up, hold, and fall to almost nothing over the last 40 %
        return min(1.0, (step + 1) / 30) * min(1.0, (1 - step / steps) / 0.4 + 0.02)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    ends: list[tuple[float, float]] = []
    model.train()
    with trange(steps, desc="pretraining", unit=" steps") as progress:
        for step in progress:
            chosen = source.rng.choices(source.prompts, k=rows_per_step)
            text, numbers = losses(model, [source.example(prompt) for prompt in chosen])
            (text + numbers).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            model.zero_grad(set_to_none=True)
            head.zero_grad(set_to_none=True)
            progress.set_postfix(text=f"{text.item():.3f}", numbers=f"{numbers.item():.3f}")
            if step + 1 > 0.9 * steps:
                ends.append((text.item(), numbers.item()))
    model.eval()
    means = [sum(column) / len(ends) for column in zip(*ends, strict=True)]
    return dict(zip(("language_model", "levels"), means, strict=True))


def _pretraining_losses(
    head: torch.nn.Linear,
    tokenizer: Qwen2Tokenizer,
    source: SelfSupervision,
    encode: Callable[[str], list[int]],
    model: Qwen2ForCausalLM,
    examples: Sequence[tuple[str, str]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of (prompt, answer) pairs, in nats: of the text a token, of the levels a known number."""
    import torch
    from torch.nn import functional

    from common.models import tokenizers
    from common.training import batches

    prompts = [encode(prompt) for prompt, _ in examples]
    answers = [tokenizers.encode_completion(tokenizer, answer) for _, answer in examples]
    rows = [
        tokenizers.Encoded(prompt + answer, 0 if source.learn_prompts else len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    batch = batches.collate(rows, tokenizer.pad_token_id)
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    text = functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=batches.IGNORE
    )
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    states = torch.cat([layer[range(len(last)), last] for layer in output.hidden_states[-3:-1]], dim=-1)
    levels = torch.tensor([source.levels(prompt) or [UNKNOWN] for prompt, _ in examples])
    known = (levels != UNKNOWN).sum().clamp(min=1)
    wrong = functional.cross_entropy(
        head(states).view(-1, LEVELS), levels.flatten(), ignore_index=UNKNOWN, reduction="sum"
    )
    return text, wrong / known
