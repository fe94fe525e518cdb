"""Baselines that both methods are scored beside: zero-shot CLIP, and a linear probe of the training data.

N training texts or photos, M test photos, C labels, D CLIP width.
"""
import torch
import torch.nn.functional as F

from data import say

# C of scikit-learn, for all data. In 5-fold cross-validation on the 20,000 training pictures of scenes, 10 gives 66.95
# mAP, 100 gives 67.16, and more at most 67.19; on the first 4,000 pictures these are 65.57, 65.33 and less.
PROBE_STRENGTH = 100.0
PROBE_LIMIT = 8e9  # training rows x width x labels; half of it takes a minute or two on two cores


def zero_shot(prompts, images):
    """Cosine with the prompts, plain and with both sides centred. prompts: [C, D]; images: [M, D] -> dict of [M, C]

    Centred, where there are two prompts or more: embeddings are scaled to length 1, the mean of their own side is
    subtracted (over the labels for prompts, over these very images, whose labels are not used, for images), and they
    are scaled to length 1 again.
    """
    prompts = F.normalize(prompts, dim=-1)
    images = F.normalize(images, dim=-1)
    scores = {"zero_shot": images @ prompts.T}
    if len(prompts) > 1:  # a single one is its own mean
        centred_prompts = F.normalize(prompts - prompts.mean(0), dim=-1)
        centred_images = F.normalize(images - images.mean(0), dim=-1)
        scores["zero_shot_centred"] = centred_images @ centred_prompts.T
    return scores


def linear_probe_where_quick(features, labels, images):
    """linear_probe -> dict of logits [M, C], empty where it would take long. Arguments as there."""
    size = features.shape[0] * features.shape[1] * labels.shape[1]
    if size > PROBE_LIMIT:
        say(f"no linear probe: {len(features):,} x {features.shape[1]} features, {labels.shape[1]:,} labels: too slow")
        return {}
    return {"linear_probe": linear_probe(features, labels, images).float()}


def linear_probe(features, labels, images, strength=PROBE_STRENGTH):
    """Logistic regression for each label, equal to scikit-learn's LogisticRegression(C=strength) on unit features.

    features: [N, D] with labels [N, C], -1 left out; images: [M, D] -> logits float64 [M, C]. All labels are fitted at
    once, by L-BFGS in coordinates u in which the curvature is at most 1 in every direction: p (1 - p) <= 1/4, so the
    loss's second derivative is at most penalty + x^T x / 4.
    """
    x = unit_rows(features)
    penalty = torch.full_like(x[0], 1 / strength)
    penalty[-1] = 0  # the intercept is free
    factor = torch.linalg.cholesky(x.mT @ x / 4 + penalty.diag())
    identity = torch.eye(len(factor)).double()
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False).mT
    x = x @ inverse
    present = (labels == 1).double()
    known = (labels >= 0).double()
    u = torch.zeros(len(factor), labels.shape[1]).double()
    u.requires_grad_()
    optimiser = torch.optim.LBFGS([u], max_iter=1000, tolerance_grad=1e-3, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        total = F.binary_cross_entropy_with_logits(x @ u, present, known, reduction="sum")
        weights = inverse @ u
        total = total + (penalty @ weights ** 2).sum() / 2
        total.backward()
        return total.detach()
    optimiser.step(loss)
    return unit_rows(images) @ (inverse @ u).detach()


def unit_rows(features):
    """[N, D] -> float64 [N, D + 1]: rows of unit length, followed by a 1 for the intercept"""
    return F.pad(F.normalize(features.double().cpu(), dim=-1), (0, 1), value=1)
