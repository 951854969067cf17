"""A batch is computed where it must be: the head at the tokens that count, a common beginning once.

Losses and gradients are those of all positions of all rows.
"""

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from spkit.config import Config
from spkit.method.derivation import derive
from spkit.method.snip import snip, snip_windows
from spkit.method.training import TrainingSet
from spkit.models import heads
from spkit.models.chat import IGNORE, answer_loss, first_counted
from spkit.models.heads import answer_logits
from spkit.models.prefix import shared_past, shared_tokens
from spkit.system import processes

VOCABULARY = heads.SMALL
SHARED = 12  # tokens that all rows begin with


def batch(shared=0, prompts=(3, 7, 5), answers=(4, 1, 6)):
    """Right-padded rows of random tokens whose answers count, and some tokens of theirs do not.

    shared: so many tokens before each row, the same in all of them.
    """
    generator = torch.Generator().manual_seed(1)
    width = max(p + a for p, a in zip(prompts, answers, strict=True))
    ids = torch.randint(8, VOCABULARY, (len(prompts), width), generator=generator)
    place = torch.arange(width)
    start, count = torch.tensor(prompts)[:, None], torch.tensor(answers)[:, None]
    real, answer = place < start + count, (place >= start) & (place < start + count)
    answer[2, 7] = False  # a hole: tokens that count need not be neighbours
    before = torch.randint(8, VOCABULARY, (1, shared), generator=generator).expand(len(ids), -1)
    parts = {
        "input_ids": (before, torch.where(real, ids, 0)),
        "attention_mask": (torch.ones_like(before), real.long()),
        "labels": (torch.full_like(before, IGNORE), torch.where(answer, ids, IGNORE)),
    }
    return {key: torch.cat(both, dim=1) for key, both in parts.items()}


class Watched:
    """The shapes of what a model's head was given, inside `with`."""

    def __init__(self, model):
        self.head, self.shapes = model.get_output_embeddings(), []

    def __enter__(self):
        # registered first, a hook would see what comes before the rows are chosen
        self.handle = self.head.register_forward_hook(
            lambda module, inputs, output: self.shapes.append(tuple(inputs[0].shape[:2]))
        )
        return self.shapes

    def __exit__(self, *_):
        self.handle.remove()


class Rows:
    """The shapes of what a model's embeddings were asked for, inside `with`."""

    def __init__(self, model):
        self.embeddings, self.shapes = model.get_input_embeddings(), []

    def __enter__(self):
        self.handle = self.embeddings.register_forward_hook(
            lambda module, inputs, output: self.shapes.append(tuple(inputs[0].shape))
        )
        return self.shapes

    def __exit__(self, *_):
        self.handle.remove()


def losses_and_gradients(model, logits, labels):
    """Losses by these logits, which tokens count, and the gradients of all weights of the model."""
    model.zero_grad()
    losses, mask = answer_loss(logits, labels)
    losses.sum().backward()
    return losses.detach(), mask, [p.grad for p in model.parameters() if p.grad is not None]


def whole_logits(model, shared=0):
    inputs = {key: value for key, value in batch(shared).items() if key != "labels"}
    return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("shared", [0, SHARED], ids=["apart", "shared"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_losses_and_gradients_are_those_of_all_positions(family, shared):
    """Also where a sliding window of 16 does not reach back to the shared tokens."""
    model, given = families.model(family, VOCABULARY), batch(shared)
    whole = whole_logits(model, shared)
    expected, mask, gradients = losses_and_gradients(model, whole, given["labels"])
    with Rows(model) as rows, Watched(model) as shapes:
        logits = answer_logits(model, given)
    assert rows == ([(1, SHARED), (3, 11)] if shared else [(3, 11)])
    assert shapes == [(1, int(mask.sum()))]
    losses, same, found = losses_and_gradients(model, logits, given["labels"])
    assert torch.equal(mask, same) and losses.dtype == torch.float32
    assert not losses[~mask].any() and losses[mask].all()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert len(found) == len(gradients)
    for one, other in zip(found, gradients, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm()) + 1e-6  # OPT's k bias: 0


def test_wrapped_by_peft_and_with_gradient_checkpointing():
    model = families.model("llama", VOCABULARY)
    torch.manual_seed(1)
    wrapped = get_peft_model(
        model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "lm_head"])
    )
    wrapped.train().gradient_checkpointing_enable({"use_reentrant": False})
    labels = batch(SHARED)["labels"]
    expected, mask, gradients = losses_and_gradients(wrapped, whole_logits(wrapped, SHARED), labels)
    with Watched(wrapped) as shapes:  # its head is a LoRA layer
        logits = answer_logits(wrapped, batch(SHARED))
    losses, _, found = losses_and_gradients(wrapped, logits, labels)
    assert shapes == [(1, int(mask.sum()))]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-6)


def test_hooks_are_gone_and_a_small_head_stays_whole(monkeypatch):
    model = families.model("llama", VOCABULARY)
    answer_logits(model, batch())
    assert whole_logits(model).shape == (3, 11, VOCABULARY)
    with pytest.raises(ZeroDivisionError):
        monkeypatch.setattr(model.model, "forward", lambda **_: 1 / 0)
        answer_logits(model, batch())
    assert not model.get_output_embeddings()._forward_pre_hooks
    small = families.model("llama", VOCABULARY - 1)
    inputs = {**batch(), "input_ids": batch()["input_ids"].clamp(max=VOCABULARY - 2)}
    assert torch.equal(answer_logits(small, inputs), small(**{**inputs, "labels": None}).logits)


@pytest.mark.parametrize("shared", [0, SHARED])
def test_a_head_that_is_not_called_gives_all_positions(shared):
    class Own(nn.Module):
        """A model that multiplies with its head's weight without calling it."""

        def __init__(self):
            super().__init__()
            self.inner = families.model("llama", VOCABULARY)
            self.config = self.inner.config
            self.get_input_embeddings = self.inner.get_input_embeddings
            self.get_output_embeddings = self.inner.get_output_embeddings
            self.get_decoder = self.inner.get_decoder

        def forward(self, **inputs):
            hidden = self.inner.model(**inputs).last_hidden_state
            return type("Out", (), {"logits": hidden @ self.inner.lm_head.weight.T})

    model, given = Own(), batch(shared)
    logits = answer_logits(model, given)
    assert logits.shape == (3, shared + 11, VOCABULARY)
    expected, _ = answer_loss(whole_logits(model.inner, shared), given["labels"])
    torch.testing.assert_close(answer_loss(logits, given["labels"])[0], expected)


def test_snip_is_the_same_and_a_scored_head_is_computed_whole(monkeypatch):
    model = families.model("llama", VOCABULARY)
    targets = ["q_proj", "down_proj"]
    for names, rows in ((targets, (1, 10)), ([*targets, "lm_head"], (3, 11))):
        with Watched(model) as shapes:
            scores = snip(model, [batch()], names)
            windows = [s for part in snip_windows(model, [batch()], names, 1) for s in part.items()]
        assert shapes[0] == shapes[-1] == rows  # of the windows, the last scores the head
        with monkeypatch.context() as patch:
            patch.setattr(heads, "SMALL", VOCABULARY + 1)
            whole = snip(model, [batch()], names)
        for name, score in [*scores.items(), *windows]:
            assert float((score - whole[name]).norm()) <= 1e-5 * float(whole[name].norm())


@pytest.mark.parametrize("direction", ["ascent", "descent"])
def test_a_derivation_computes_the_answers_alone(direction, monkeypatch):
    """Its patch is that of whole rows, and the head has only seen what counts."""
    pairs = zip(*(batch(SHARED)[key].tolist() for key in ("input_ids", "labels")), strict=True)
    data = TrainingSet(list(pairs), 0, "any")
    steps = {"max_steps": 2, "batch_size": 3, "warmup_steps": 0, "learning_rate": 1e-3}
    ascent = {**steps, "token_loss_clamp": 60.0, "stop_mean_loss": 50.0}
    lora = {"r": 4, "targets": "auto"}
    sections = {"lora": lora, "ascent": ascent, "descent": steps}
    config = Config.from_sources({"derivation": sections}).derivation
    model = families.model("llama", VOCABULARY)
    with Rows(model) as rows, Watched(model) as shapes:
        patch, curve = derive(model, data, direction, config, seed=0)
    assert set(shapes) == {(1, 10)} and set(rows) == {(1, SHARED), (3, 11)}
    monkeypatch.setattr(heads, "SMALL", VOCABULARY + 1)
    whole, same = derive(model, data, direction, config, seed=0)
    assert list(curve["loss"]) == pytest.approx(list(same["loss"]), rel=1e-4)
    for name, factors in patch.factors.items():
        for one, other in zip(factors, whole.factors[name], strict=True):
            assert float((one - other).norm()) <= 1e-3 * float(other.norm())


def test_the_first_token_that_counts():
    labels = torch.tensor([[9, IGNORE, 4, 5], [IGNORE, 3, IGNORE, 2], [IGNORE] * 4])
    rest = IGNORE
    expected = [[rest, rest, 4, rest], [rest, 3, rest, rest], [rest] * 4]
    assert first_counted(labels).tolist() == expected
    first = {**batch(), "labels": first_counted(batch()["labels"])}
    logits = answer_logits(families.model("llama", VOCABULARY), first)
    assert logits.shape == (1, 3, VOCABULARY)  # one token a pair


def test_which_tokens_are_shared():
    whole = batch(SHARED)
    assert shared_tokens(whole) == SHARED
    assert shared_tokens(batch()) == 0
    assert shared_tokens({**whole, "attention_mask": 1 - whole["attention_mask"]}) == 0
    counting = whole["labels"].clone()
    counting[1, 5] = 9  # the token at 4 predicts it
    assert shared_tokens({**whole, "labels": counting}) == 4
    alike = {key: value[:1].expand(3, -1) for key, value in whole.items()}
    first = int((alike["labels"][0] != IGNORE).nonzero()[0])
    assert shared_tokens(alike) == first - 1  # equal answers count


@pytest.mark.parametrize("why", ["few", "one row", "processes", "4 bits", "checkpointing", "state"])
def test_rows_stay_whole(why, monkeypatch):
    model, given = families.model("llama", VOCABULARY), batch(SHARED)
    assert shared_past(model, given).get_seq_length() == SHARED
    if why == "few":
        given = batch(shared=2)
    elif why == "one row":
        given = {key: value[:1] for key, value in given.items()}
    elif why == "processes":
        monkeypatch.setattr(processes.One, "count", 2)
    elif why == "4 bits":
        model.is_quantized = True
    elif why == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
        model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, **sizes))
    assert shared_past(model, given) is None


def test_importance_sees_whole_rows():
    model = families.model("llama", VOCABULARY)
    with Rows(model) as rows:
        snip(model, [batch(SHARED)], ["q_proj"])
    assert rows == [(3, SHARED + 11)]
