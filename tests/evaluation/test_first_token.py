"""KL divergence of the first answer token: by hand, in which direction, on which prompts."""

import json
import math

import pytest
import tiny
import torch

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.evaluation import utility
from spkit.evaluation.utility import first_token
from spkit.evaluation.utility.first_token import (
    first_token_logprobs,
    kl_divergences,
    kl_prompts,
    load_first_tokens,
    mean_kl,
    save_first_tokens,
)
from spkit.models.chat import encode_prompt
from spkit.sandbox import world

TOKENIZER = tiny.tokenizer()
PROMPTS = ["how do i mend a boat", "paint", "use the old net and then take a fence", "no sorry"]


def alone(model, prompt):
    """log p of the first token, one prompt by itself and unpadded."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([encode_prompt(TOKENIZER, prompt)])).logits
    return torch.log_softmax(logits[0, -1].double(), dim=-1)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_logprobs_are_those_of_each_prompt_alone(architecture, batch_size):
    model = tiny.model(architecture)
    found = first_token_logprobs(model, TOKENIZER, PROMPTS, batch_size)
    assert found.dtype == torch.float32 and found.shape == (4, 32) and found.device.type == "cpu"
    expected = torch.stack([alone(model, prompt) for prompt in PROMPTS])
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_positions_are_counted_without_the_padding():
    """GPT-2 has absolute positions: padding on the left would move them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(initializer_range=0.5, **sizes)).eval()
    found = first_token_logprobs(model, TOKENIZER, PROMPTS, 4)
    expected = torch.stack([alone(model, prompt) for prompt in PROMPTS])
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_only_the_last_position_has_logits():
    model, shapes = tiny.model("llama"), []
    model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    first_token_logprobs(model, TOKENIZER, PROMPTS, 3)
    assert [tuple(shape) for shape in shapes] == [(3, 1, 32), (1, 1, 32)]


def test_a_model_in_half_precision_gives_fp32():
    model = tiny.model("llama").to(torch.bfloat16)
    found = first_token_logprobs(model, TOKENIZER, PROMPTS, 2)
    assert found.dtype == torch.float32
    assert torch.allclose(found.exp().sum(dim=-1), torch.ones(4), atol=1e-6)


def test_divergence_by_hand_and_its_direction():
    base = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    now = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    there = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    back = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert there != pytest.approx(back, rel=0.05)
    assert kl_divergences(base, now).tolist() == pytest.approx([there, 0.0], rel=1e-6, abs=1e-12)
    assert mean_kl(base, now) == pytest.approx(there / 2)
    assert mean_kl(now, base) == pytest.approx(back / 2)
    assert mean_kl(base, base) == 0.0


def test_impossible_tokens():
    sure = torch.tensor([[1.0, 0.0]]).log()
    even = torch.tensor([[0.5, 0.5]]).log()
    assert mean_kl(sure, even) == pytest.approx(math.log(2))
    assert mean_kl(sure, sure) == 0.0
    assert mean_kl(even, sure) == math.inf
    with pytest.raises(SpkitError, match=r"\[1, 2\] log-probabilities .* compared with \[2, 2\]"):
        mean_kl(even, torch.zeros(2, 2))


def test_it_is_never_negative_by_rounding():
    torch.manual_seed(0)
    logits = torch.randn(50, 5000)
    base = torch.log_softmax(logits, dim=-1)
    now = torch.log_softmax(logits + 1e-4 * torch.randn_like(logits), dim=-1)
    assert 1e-9 < kl_divergences(base, now).min() < 1e-8


# ---- which prompts -------------------------------------------------------------------------------


def config(path, split="test", **utility):
    return Config.from_sources(
        {
            "data": {
                "sources": {"calm": {"reader": "own", "path": str(path)}},
                "dev_share": 0.4,
            },
            "evaluation": {"split": split},
            "utility": {"kl": "calm", "batch_size": 3, **utility},
        }
    )


def written(path, count=40, **extra):
    words = tiny.SENTENCE.split()
    rows = [
        {
            "prompt": f"{words[i % 18]} {words[(7 * i + i // 18) % 18]} {words[(3 * i) % 18]}",
            "objective": "utility",
            "category": "calm",
            **extra,
        }
        for i in range(count)
    ]
    assert len({row["prompt"] for row in rows}) == count
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_dev_and_test_never_share_a_prompt_and_the_sample_is_fixed(tmp_path):
    path = written(tmp_path / "calm.jsonl")
    dev, test = (kl_prompts(config(path, split)) for split in ("dev", "test"))
    assert (
        not set(dev) & set(test) and 25 <= len(dev) + len(test) < 40
    )  # the rest is the alignment's
    assert min(len(dev), len(test)) >= 5
    few = kl_prompts(config(path, kl_prompts=5))
    assert few == kl_prompts(config(path, kl_prompts=5)) and len(few) == 5
    assert set(few) < set(test) and few != test[:5]


def test_a_row_may_say_its_split_and_a_harmful_one_is_an_error(tmp_path):
    path = written(tmp_path / "calm.jsonl", split="dev")
    assert len(kl_prompts(config(path, "dev"))) == 40
    with pytest.raises(SpkitError, match="calm: no instruction for 'test' among its prompts"):
        kl_prompts(config(path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["objective"] = "harmful"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SpkitError, match="calm: the prompt '4' is harmful"):
        kl_prompts(config(path, "dev"))


def test_the_village_has_harmless_instructions_too():
    known = Config.from_sources({"utility": {"kl": "sandbox", "kl_prompts": 10}})
    asked = {p.prompt for p in world.eval_prompts("test") if p.objective == "utility"}
    assert set(kl_prompts(known)) < asked and len(kl_prompts(known)) == 10


def test_an_unknown_name_is_told_before_a_model_is_loaded(tmp_path):
    known = config(written(tmp_path / "calm.jsonl"), kl="claim")
    with pytest.raises(SpkitError, match="utility.kl is 'claim'.*did you mean calm"):
        utility.check_utility(known)


# ---- in the frame, and kept between notebooks ----------------------------------------------------


def test_rows_of_the_frame(tmp_path):
    known = config(written(tmp_path / "calm.jsonl"), kl_prompts=6)
    base, other = tiny.model("llama"), tiny.model("llama", seed=1)
    first = utility.first_tokens(base, TOKENIZER, known)
    frames = [
        utility.measure(model, TOKENIZER, known, name=name, base_logprobs=first)
        for name, model in {"base": base, "a patch": other}.items()
    ]
    rows = [frame[frame["kind"] == "kl"].iloc[0] for frame in frames]
    assert [row["value"] for row in rows][0] == 0.0
    asked = kl_prompts(known)
    by_hand = [
        float((alone(base, p).exp() * (alone(base, p) - alone(other, p))).sum()) for p in asked
    ]
    assert len(set(by_hand)) > 1 and min(by_hand) > 0.01
    assert rows[1]["value"] == pytest.approx(sum(by_hand) / 6, rel=1e-4)
    spread = torch.tensor(by_hand, dtype=torch.float64).std() / 6**0.5
    assert rows[1]["stderr"] == pytest.approx(float(spread), rel=1e-4)
    assert (rows[1]["task"], rows[1]["metric"], rows[1]["n"]) == ("KL of the first token", "kl", 6)
    table = utility.short_table(frames[1])
    assert table.columns.tolist() == ["perplexity", "KL of the first token"]
    with pytest.raises(SpkitError, match="utility.kl is 'calm': the backbone's log-probs"):
        utility.measure(other, TOKENIZER, known, name="a patch")


def test_nothing_is_measured_where_no_prompts_are_named(monkeypatch):
    monkeypatch.setattr(first_token, "first_token_logprobs", None)
    assert utility.first_tokens(None, TOKENIZER, Config()) is None
    frame = utility.measure(tiny.model("llama"), TOKENIZER, Config(), name="base")
    assert frame["kind"].tolist() == ["perplexity"]


def test_the_file_names_its_prompts_without_showing_them(tmp_path):
    path = written(tmp_path / "calm.jsonl")
    known = config(path, kl_prompts=6)
    first = utility.first_tokens(tiny.model("llama"), TOKENIZER, known)
    save_first_tokens(tmp_path, first, known)
    file = tmp_path / "first_token.safetensors"
    assert torch.equal(load_first_tokens(file, known), first)
    assert kl_prompts(known)[0].encode() not in file.read_bytes()
    before = file.read_bytes()
    save_first_tokens(tmp_path, first, known)
    assert file.read_bytes() == before
    for other in (config(path, kl_prompts=7), config(path, "dev", kl_prompts=6)):
        with pytest.raises(SpkitError, match="is of other prompts than those of utility.kl"):
            load_first_tokens(file, other)
    file.write_bytes(before[:-8])
    with pytest.raises(SpkitError, match="cannot be read as the backbone's first tokens"):
        load_first_tokens(file, known)
