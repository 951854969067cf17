"""Two measures of continual learning after Chaudhry et al. 2018: forgetting and intransigence."""

import numpy as np

from spkit.errors import SpkitError


def forgetting(scores) -> float:
    """How much of its best score a task loses by the last stage, averaged over earlier tasks.

    scores: [stage, task], higher is better; row k is after stage k, task j is learnt at stage j.
    f_j = max over l in j..K-2 of scores[l, j], minus scores[K-1, j]; negative where later stages
    helped. After Chaudhry et al. 2018 (arXiv 1801.10112), with two departures: their maximum runs
    over all l before the last stage, here from the stage that learns the task, since what was not
    learnt cannot be forgotten; and a single stage, which they leave undefined, gives 0. Scores
    above the diagonal are not used and may be nan. SpkitError for a table that is not square or
    lacks a score that is used.
    """
    scores = _stages(scores)
    last = len(scores) - 1
    if last == 0:
        return 0.0
    losses = [scores[j:last, j].max() - scores[last, j] for j in range(last)]
    return float(np.mean(losses))


def intransigence(reference, scores) -> float:
    """How much worse a task is when just learnt than in joint training, averaged over stages.

    reference: [stage], the score on task k of a model trained jointly on tasks 0..k; scores as in
    forgetting(), of which the diagonal counts. Chaudhry et al. 2018 give one value for each stage;
    this is their mean. SpkitError for lengths that differ, or a reference that is no number.
    """
    scores = _stages(scores)
    reference = np.asarray(reference, dtype=np.float64)
    if reference.shape != (len(scores),) or np.isnan(reference).any():
        raise SpkitError(
            f"the reference must be {len(scores)} numbers, one a stage, not {reference.tolist()}"
        )
    return float(np.mean(reference - np.diag(scores)))


def _stages(scores) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or not scores.size:
        raise SpkitError(f"scores must be [stages, tasks], as many, not {list(scores.shape)}")
    holes = np.argwhere(np.isnan(np.tril(scores)))
    if len(holes):
        stage, task = holes[0]
        raise SpkitError(f"there is no score of task {task} after stage {stage}")
    return scores
