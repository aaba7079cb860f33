"""Trains the embedded model `pydoc_tiny` and writes its checkpoint folder with the model card.

    python scripts/train_pydoc_tiny.py

The model is a small Qwen3: grouped-query attention, QK norm, sliding and full layers. Its text is the documentation
topics of the running Python's standard library, so that the default job has a trained model without a network.

The tokenizer and the weights never see the held-out topics. Early stopping uses further topics. The script measures
every figure of the card on the written checkpoint.
"""

import argparse
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics as TOPICS  # noqa: N812
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional as F  # noqa: N812

CARD = Path(__file__).with_name("pydoc_tiny_card.md")
OUTPUT = Path(__file__).resolve().parent.parent / "qk_sniffer" / "assets" / "pydoc_tiny"

# Topics of Python 3.11 to 3.14 that share almost no text with other topics. Many topics contain others.
HELD_OUT = (
    "assert", "binary", "booleans", "calls", "del", "exprlists", "global", "import", "objects", "raise",
    "truth", "typesmapping", "unary", "yield",
)  # fmt: skip
EARLY_STOPPING = (
    "atom-identifiers", "dict", "nonlocal", "slicings", "specialattrs", "strings", "subscriptions", "typesmethods",
)  # fmt: skip

# The one special token: the tokenizer puts it before every text; it is also the end of a text and the padding.
BOUNDARY = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """The settings of the training; `tokens_per_step` is the size of a batch of any context length."""

    seed: int = 0
    vocab_size: int = 1536
    steps: int = 500
    warmup_steps: int = 20
    evaluate_every: int = 25
    tokens_per_step: int = 4096
    contexts: tuple[int, ...] = (512, 2048, 4096)
    context_weights: tuple[float, ...] = (0.85, 0.1, 0.05)
    learning_rate: float = 3e-3
    matrix_learning_rate: float = 0.02
    weight_decay: float = 0.1
    dropout: float = 0.1
    merge_dropout: float = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description="Train pydoc_tiny and write its checkpoint folder.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    # A fixed number: sums are split in the same way on any number of cores.
    torch.set_num_threads(2)
    train(Recipe(), parser.parse_args().output)


def train(recipe: Recipe, output: Path) -> None:
    """Trains by `recipe` and writes the checkpoint and its card to the folder `output`."""
    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    training = [text for name, text in TOPICS.items() if name not in HELD_OUT + EARLY_STOPPING]
    stopping = [TOPICS[name] for name in EARLY_STOPPING]
    tokenizer = train_tokenizer(training + stopping, recipe.vocab_size)
    model = transformers.Qwen3ForCausalLM(model_config(recipe.vocab_size))
    initialise(model)
    add_dropout(model, recipe.dropout)
    best_step, best_state = optimise(model, tokenizer, training, stopping, recipe)
    model.load_state_dict(best_state)
    model.bfloat16().save_pretrained(output)
    (output / "generation_config.json").unlink()
    special = {"bos_token": BOUNDARY, "eos_token": BOUNDARY, "pad_token": BOUNDARY}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8192, **special)
    fast.save_pretrained(output)
    (output / "README.md").write_text(model_card(output, training, recipe, best_step), encoding="utf-8")


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE. All 256 bytes are in its vocabulary, so every text has tokens and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOUNDARY], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    boundary = (BOUNDARY, tokenizer.token_to_id(BOUNDARY))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOUNDARY} $A", special_tokens=[boundary])
    return tokenizer


def model_config(vocab_size: int) -> transformers.Qwen3Config:
    layer_types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    return transformers.Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=len(layer_types),
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        use_sliding_window=True,
        sliding_window=128,
        layer_types=layer_types,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def initialise(model: transformers.Qwen3ForCausalLM) -> None:
    """Sets the output matrices of sublayers to zero, so that the tied embedding learns from the first step."""
    for name, parameter in model.model.layers.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def add_dropout(model: transformers.Qwen3ForCausalLM, probability: float) -> None:
    """Adds dropout to the output of each sublayer, which the Qwen3 code does not have."""

    def drop(module: nn.Module, _: Any, out: torch.Tensor) -> torch.Tensor:
        return F.dropout(out, probability, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def optimise(
    model: nn.Module, tokenizer: Tokenizer, training: Sequence[str], stopping: Sequence[str], recipe: Recipe
) -> tuple[int, dict[str, torch.Tensor]]:
    """Runs all steps; returns the step and the weights with the lowest loss on the early-stopping topics."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or ".layers." not in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    cosine = transformers.get_cosine_schedule_with_warmup
    schedules = [cosine(optimizer, recipe.warmup_steps, recipe.steps) for optimizer in optimizers]
    stopping_ids = [tokenizer.encode(text).ids for text in stopping]
    best_loss, best_step, best_state = math.inf, 0, {}
    batches = training_batches(tokenizer, training, recipe)
    for step, ids in zip(range(1, recipe.steps + 1), batches, strict=False):
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = token_losses(model, ids).mean()
        model.zero_grad()
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % recipe.evaluate_every == 0:
            stopping_loss = mean_loss(model, stopping_ids)
            print(f"step {step}: training {loss.item():.3f}, early stopping {stopping_loss:.3f}", flush=True)
            if stopping_loss < best_loss:
                best_loss, best_step = stopping_loss, step
                best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return best_step, best_state


def training_batches(tokenizer: Tokenizer, texts: Sequence[str], recipe: Recipe) -> Iterator[torch.Tensor]:
    """Yields endless batches (tokens_per_step // context, context) of token ids; each row starts with the boundary.

    Each pass shuffles the texts and tokenizes them again with random merges omitted (BPE dropout), so that the small
    corpus does not repeat the same tokens.
    """
    noisy = Tokenizer.from_str(tokenizer.to_str())
    noisy.model.dropout = recipe.merge_dropout
    stream: list[int] = []
    while True:
        [context] = random.choices(recipe.contexts, recipe.context_weights)
        rows = recipe.tokens_per_step // context
        taken = rows * (context - 1)
        while len(stream) < taken:
            for text in random.sample(texts, len(texts)):
                stream += noisy.encode(text).ids
        batch = torch.tensor(stream[:taken]).view(rows, context - 1)
        yield F.pad(batch, (1, 0), value=noisy.token_to_id(BOUNDARY))
        del stream[:taken]


def token_losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Returns the loss in nats of every token of `ids` (rows, n) except the first of each row; flat, in order."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def mean_loss(model: nn.Module, sequences: Sequence[Sequence[int]]) -> float:
    """Returns the mean loss in nats per token over sequences that start with the boundary token, each run alone."""
    model.eval()
    return torch.cat([token_losses(model, torch.tensor([ids])) for ids in sequences]).mean().item()


def model_card(output: Path, training: Sequence[str], recipe: Recipe, best_step: int) -> str:
    """Returns the README of the checkpoint folder `output`, with figures measured on this checkpoint."""
    model = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    held_out = [tokenizer(TOPICS[name]).input_ids for name in HELD_OUT]
    tokens = [token for ids in held_out for token in ids[1:]]
    num_bytes = sum(len(TOPICS[name].encode()) for name in HELD_OUT)
    counts = Counter(token for text in training for token in tokenizer(text, verbose=False).input_ids[1:])
    unigram = sum(math.log((counts.total() + len(tokenizer)) / (counts[token] + 1)) for token in tokens) / len(tokens)
    losses = {"this model": mean_loss(model, held_out), "unigram": unigram, "chance": math.log(len(tokenizer))}
    by_context = {}
    for context in (512, 2048, 4096, 8192):
        pieces = [tokens[start : start + context - 1] for start in range(0, len(tokens), context - 1)]
        by_context[context] = mean_loss(model, [[tokenizer.bos_token_id, *piece] for piece in pieces])
    per_byte = len(tokens) / num_bytes
    return CARD.read_text(encoding="utf-8").format(
        recipe=recipe,
        best_step=best_step,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        python=".".join(map(str, sys.version_info[:3])),
        versions=f"torch {version('torch').split('+')[0]}, transformers {version('transformers')}",
        training=f"{len(training)} topics, {counts.total():,} tokens",
        early_stopping=", ".join(EARLY_STOPPING),
        held_out=", ".join(HELD_OUT),
        held_out_size=f"{len(tokens):,} tokens ({num_bytes:,} bytes)",
        losses="\n".join(f"| {name} | {loss:.3f} | {loss * per_byte:.3f} |" for name, loss in losses.items()),
        by_context="\n".join(f"| {context:,} | {loss:.3f} |" for context, loss in by_context.items()),
    )


if __name__ == "__main__":
    main()
