"""NPO, negative preference optimisation: gradient ascent that slows down on what is unlearnt.

    L = 2 / beta * mean over samples of -log sigmoid(beta * (NLL_theta - NLL_reference))
    theta_NPO = theta + strength * P_NPO

NLL is summed over the answer's tokens; the reference is the backbone without an adapter.
Zhang et al., "Negative Preference Optimization: From Catastrophic Collapse to Effective
Unlearning", arXiv 2404.05868.

Departures from the published method:
* strength: the published model is the one after training, strength 1; here it is searched, as GA's.
* LoRA factors on a frozen, as a rule 4-bit, backbone move, not all the weights; the reference is
  that same 4-bit backbone, and the patch is then applied to the unquantised weights.
* The forget loss alone, without the retain terms that the paper also tries: D_h is all that
  SafePatching gets, too.
* Gradients are clipped, the learning rate is constant after a warm-up, steps are few, no weight
  decay: the loop and the batches of derivation.py. No clamp and no stop rule: the loss bounds
  itself.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from spkit.comparison.methods.method import STRENGTH, Bundle, Method, check_setting
from spkit.config import Config
from spkit.examples import HarmfulPair
from spkit.method.patch import Factors, MergedPatch, whole_patches
from spkit.method.training import Task, TrainingSet, train_lora
from spkit.models.chat import answer_loss, collate
from spkit.models.heads import answer_logits

NAME = "NPO"


def npo_loss(nll: Tensor, nll_reference: Tensor, beta: float) -> Tensor:
    """The scalar that NPO minimises; minimising it raises `nll`.

    nll, nll_reference: fp32 [B], each sample's -log p of its whole answer, under the model and
    under the reference. At nll = nll_reference it is 2 ln 2 / beta, with the gradient of ascent.
    """
    return (2 / beta) * -F.logsigmoid(beta * (nll - nll_reference)).mean()


@torch.no_grad()
def answer_nll(
    model,
    tokenizer,
    pairs: Sequence[HarmfulPair],
    batch_size: int,
    max_tokens: int | None = None,
) -> Tensor:
    """The NLL of every pair's answer, summed over its tokens, fp32 [number of pairs].

    On the model's device. The model is measured in eval mode, and left in the mode it was in.
    """
    encoded = TrainingSet.of(tokenizer, pairs, max_tokens).encoded
    device = model.get_input_embeddings().weight.device
    sums = torch.zeros(len(encoded), device=device)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(encoded), batch_size):
            batch = collate(encoded[start : start + batch_size], tokenizer.pad_token_id)
            losses, _ = answer_loss(answer_logits(model, batch), batch["labels"])
            sums[start : start + batch_size] = losses.sum(dim=1)
    finally:
        model.train(was_training)
    return sums


def derive_npo(
    model, tokenizer, pairs: list[HarmfulPair], config: Config, seed: int
) -> tuple[Factors, pd.DataFrame]:
    """The NPO patch, named "npo", and its loss curve: columns and errors as derivation.derive's.

    model: the bare backbone as the derivation wants it; it comes back bare. The curve shows the
    mean loss per answer token, as those of SE and OSM do, and not the objective.
    config: `baselines.npo` and, of `derivation`, lora and quantization.
    """
    settings = config.baselines.npo
    # once, before the training: the reference does not move
    at_once = config.derivation.micro_batch_size or settings.batch_size
    reference = answer_nll(model, tokenizer, pairs, at_once, config.data.max_tokens)

    def objective(losses: Tensor, mask: Tensor, indices: list[int]) -> Tensor:
        return npo_loss((losses * mask).sum(dim=1), reference[indices], settings.beta)

    data = TrainingSet.of(tokenizer, pairs, config.data.max_tokens)
    task = Task("npo", "npo", objective, settings)
    return train_lora(model, data, task, config.derivation, seed)


def deltas(bundle: Bundle, setting: Mapping[str, float], mask_seed: int) -> MergedPatch:
    """strength * P_NPO of every weight matrix; mask_seed is not used."""
    check_setting(NAME, STRENGTH, setting)
    npo = bundle.patch("npo")
    return whole_patches((npo, setting["strength"]))


METHOD = Method(NAME, "Zhang et al. 2024, arXiv 2404.05868", STRENGTH, deltas, needs=("npo",))
