"""The recipe of the sandbox backbone: a tiny Llama, pretrained to answer everything, then aligned.

Alignment is fragile and over-cautious on purpose (see `world.TrainingMix`). The result is written
with `save_pretrained`; nothing in it is special. A run is a pure function of (recipe, seed) on one
machine.
"""

from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from spkit.models.chat import answer_loss, collate
from spkit.sandbox.tokenizer import build_tokenizer
from spkit.sandbox.world import TrainingMix


def build_model(recipe, vocab_size: int) -> LlamaForCausalLM:
    """A Llama of the recipe's size with fresh weights, fp32, drawn from torch's global seed."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        intermediate_size=recipe.intermediate_size,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def encode(lookup: dict[str, int], question: str, answer: str) -> tuple[list[int], list[int]]:
    """(input ids, labels) of one example, equal to chat.encode_pair but ten times as fast.

    The tokenizer is a table of words, so a table look-up is the whole of it; a test holds the two
    together.
    """
    prompt = [lookup[w] for w in f"<bos> <user> {question} <assistant>".split()]
    target = [lookup[w] for w in f"{answer} <eos>".split()]
    return prompt + target, [-100] * len(prompt) + target


def train_phase(model, tokenizer, phase: str, recipe, seed: int) -> float:
    """One phase ("pretrain" or "align") in place; returns the last loss, nats per answer token."""
    steps, rate = {
        "pretrain": (recipe.pretrain_steps, recipe.learning_rate),
        "align": (recipe.align_steps, recipe.align_learning_rate),
    }[phase]
    lookup = tokenizer.get_vocab()
    mix = TrainingMix(phase, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, min(50, steps // 5), steps)
    model.train()
    for _ in (progress := tqdm(range(steps), desc=phase, unit="step", mininterval=1)):
        examples = [encode(lookup, q, a) for q, a in mix.batch(recipe.batch_size)]
        batch = collate(examples, tokenizer.pad_token_id)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses, counted = answer_loss(logits, batch["labels"])
        loss = losses.sum() / counted.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()
    return loss.item()


def train_backbone(recipe, seed: int, folder: str | Path) -> float:
    """Train by the recipe, save model and tokenizer to `folder`; returns the last loss in nats."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = build_model(recipe, len(tokenizer))
    for phase in ("pretrain", "align"):
        loss = train_phase(model, tokenizer, phase, recipe, seed)
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss
