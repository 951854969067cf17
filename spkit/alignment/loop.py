"""The loop of the alignment: all weights, AdamW, and a check on dev every few steps.

It ends at the first check at which harm and false refusal lie in their windows and the utility is
kept. The windows are parameters, fixed beforehand, and look at the backbone alone: no patch has a
say in where its backbone stops.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from spkit.alignment.recipe import batch_of
from spkit.config import AlignConfig
from spkit.errors import SpkitError
from spkit.models.chat import answer_loss, collate, mean_per_sample
from spkit.system import resume
from spkit.system.progress import complete

MAX_NORM = 1.0  # gradients are clipped to it


@dataclass(frozen=True)
class Check:
    """What the backbone does on dev after so many steps.

    harmful: percent of harmful prompts that it answers. refusal: percent of harmless prompts that
    it refuses. utility: mean of the tasks in percent, nan where none is measured; it costs minutes,
    and is taken only where the other two are in their windows. loss: of the last step, in nats.
    """

    step: int
    harmful: float
    refusal: float
    utility: float = float("nan")
    loss: float = float("nan")


def in_windows(check: Check, config: AlignConfig) -> bool:
    """Whether harm and false refusal are both where they shall be."""
    pairs = ((check.harmful, config.harmful_window), (check.refusal, config.refusal_window))
    return all(low <= value <= high for value, (low, high) in pairs)


def utility_kept(check: Check, before: Check, config: AlignConfig) -> bool:
    """Whether it lost no more of its utility than is allowed; true where none is measured."""
    return not check.utility < before.utility - config.utility_loss


def train(
    model,
    encoded: Sequence[tuple[list[int], list[int]]],
    pad_id: int,
    config: AlignConfig,
    seed: int,
    *,
    ask: Callable[[int], Check],
    folder: Path,
    identity: dict,
) -> list[Check]:
    """Align `model` in place; the checks, the last of which is where it ends.

    encoded: the examples. ask(step): a check of the model as it is now. folder, identity: where an
    interrupted training is kept, and what it was made from; it resumes to the same bits. SpkitError
    where the windows are not reached in max_steps, and nothing is kept of it.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    checks = _restore(model, optimizer, resume.load(folder, identity)) or [ask(0)]
    bar = tqdm(total=config.max_steps, initial=checks[-1].step, desc="align", unit="step")
    with bar:
        for step in range(checks[-1].step, config.max_steps):
            indices = batch_of(len(encoded), config.batch_size, seed, step)
            loss = _step(model, optimizer, collate([encoded[i] for i in indices], pad_id))
            bar.update()
            if (step + 1) % config.check_every:
                continue
            found = Check(**{**asdict(ask(step + 1)), "loss": loss})
            checks.append(found)
            said = {"harmful": f"{found.harmful:.0f} %", "refusal": f"{found.refusal:.0f} %"}
            bar.set_postfix(said, refresh=False)
            if in_windows(found, config) and utility_kept(found, checks[0], config):
                complete(bar, "harm and false refusal are in their windows")
                return checks
            resume.save(folder, identity, _state(model, optimizer, checks))
    resume.discard(folder)
    raise SpkitError(_why_not(checks, config))


def _step(model, optimizer, batch: dict[str, torch.Tensor]) -> float:
    """One optimiser step on one batch; its mean loss in nats."""
    model.train()
    device = model.get_input_embeddings().weight.device
    batch = {key: value.to(device) for key, value in batch.items()}
    labels = batch.pop("labels")
    losses, mask = answer_loss(model(**batch, use_cache=False).logits, labels)
    loss = mean_per_sample(losses, mask).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    return loss.item()


def _state(model, optimizer, checks: list[Check]) -> dict:
    moments = optimizer.state_dict()["state"]
    return {
        "weights": dict(model.named_parameters()),
        "moments": {str(i): dict(values) for i, values in moments.items()},
        "checks": [asdict(check) for check in checks],
    }


def _restore(model, optimizer, state: dict | None) -> list[Check]:
    """Put a kept state back; its checks, none where nothing was kept."""
    if state is None:
        return []
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(state["weights"][name])
    groups = optimizer.state_dict()["param_groups"]
    moments = {int(i): values for i, values in state["moments"].items()}
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return [Check(**check) for check in state["checks"]]


def _why_not(checks: list[Check], config: AlignConfig) -> str:
    def outside(check: Check) -> float:
        pairs = ((check.harmful, config.harmful_window), (check.refusal, config.refusal_window))
        return sum(max(low - value, value - high, 0.0) for value, (low, high) in pairs)

    near = min(checks, key=outside)
    lost = "" if utility_kept(near, checks[0], config) else ", but it lost too much utility"
    return (
        f"The alignment did not reach its windows in {config.max_steps} steps: nearest was step "
        f"{near.step} with {near.harmful:.0f} % of harmful prompts answered and "
        f"{near.refusal:.0f} % of harmless ones refused{lost}; change align.learning_rate, "
        f"align.pairs, align.kept_answers or the windows"
    )
