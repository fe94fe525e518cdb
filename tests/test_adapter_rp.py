"""adapter_rp.py: every fused path against its reference (outputs and gradients), formulas by hand, laws of the noise, counted work."""
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import adapter_rp as rp

LOSSES = {"asymmetric": (rp.asymmetric_loss_reference, rp.asymmetric_loss_fused), "bce": (rp.bce_loss_reference, rp.bce_loss_fused),
          "ranking": (rp.ranking_loss_reference, rp.ranking_loss_fused)}
EXPONENTS = [(4.0, 0.0, 0.0), (2.0, 0.0, 0.0), (4.0, 1.0, 0.05), (0.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.5, 0.0, 0.1), (1.0, 2.0, 0.2), (0.0, 0.0, 0.05), (3.0, 0.0, 0.0)]


def case(*shape, seed=0, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, generator=generator, dtype=dtype)
    targets = (torch.rand(*shape, generator=generator) < 0.25).to(torch.int8)
    targets[torch.rand(*shape, generator=generator) < 0.1] = -1
    return logits.requires_grad_(), targets


def same(reference, fused, inputs, others, rtol=1e-10, atol=1e-12):
    """Outputs and the gradients of all inputs, with a gradient from above that is not 1."""
    outputs, gradients = [], []
    for function in (reference, fused):
        output = function(*inputs, *others)
        outputs.append(output.detach())
        gradients.append(torch.autograd.grad(2.5 * output, inputs))
    torch.testing.assert_close(*outputs, rtol=rtol, atol=atol)
    for mine, theirs in zip(*gradients):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (17, 23), (3, 5, 11)])
def test_losses_fused_equal_reference_at_defaults(name, shape):
    logits, targets = case(*shape)
    same(*LOSSES[name], [logits], [targets])
    assert str(inspect.signature(LOSSES[name][0])) == str(inspect.signature(LOSSES[name][1]))


@pytest.mark.parametrize("exponents", EXPONENTS)
def test_asymmetric_exponents(exponents):
    logits, targets = case(13, 19, seed=1)
    same(*LOSSES["asymmetric"], [logits], [targets, *exponents])
    assert torch.autograd.gradcheck(lambda z: rp.asymmetric_loss_fused(z, targets, *exponents), [logits])
    assert torch.autograd.gradcheck(lambda z: rp.asymmetric_loss_reference(z, targets, *exponents), [logits])


@pytest.mark.parametrize("name", ["bce", "ranking"])
def test_other_losses_gradcheck(name):
    logits, targets = case(4, 6, seed=2)
    assert torch.autograd.gradcheck(lambda z: LOSSES[name][1](z, targets), [logits])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponents", EXPONENTS)
def test_asymmetric_extreme_logits(dtype, exponents):
    """Loss and gradient stay finite, and equal, at +-1e4 and where the sigmoid rounds to 0 or 1."""
    values = torch.tensor([-1e4, -700, -90, -40, -17, -1e-3, 0, 1e-3, 17, 40, 90, 700, 1e4], dtype=dtype)
    logits = values.repeat(3, 1).requires_grad_()
    targets = torch.tensor([1, 0, -1], dtype=torch.int8)[:, None].expand(3, len(values))
    rtol, atol = (1e-10, 1e-12) if dtype == torch.float64 else (2e-5, 1e-5)
    same(*LOSSES["asymmetric"], [logits], [targets, *exponents], rtol, atol)


def test_asymmetric_by_hand():
    """z = log 3 gives p = 3/4. Present, gamma+ 1: -(1/4) log(3/4). Absent, gamma- 2, clip 1/4: q = 1/2, -(1/4) log(1/2). Ignored: 0."""
    logits, targets = torch.full((1, 3), math.log(3), dtype=torch.float64), torch.tensor([[1, 0, -1]])
    expected = -0.25 * math.log(0.75) - 0.25 * math.log(0.5)
    for function in LOSSES["asymmetric"]:
        assert function(logits, targets, 2.0, 1.0, 0.25).item() == pytest.approx(expected, abs=1e-12)


def test_bce_equals_pytorch():
    logits, targets = case(6, 9)
    targets = targets.clamp_min(0)
    expected = F.binary_cross_entropy_with_logits(logits, targets.double(), reduction="sum") / 6
    for function in LOSSES["bce"]:
        torch.testing.assert_close(function(logits, targets), expected)
    torch.testing.assert_close(rp.asymmetric_loss_reference(logits, targets, 0.0, 0.0, 0.0), expected)


def test_ranking_by_hand():
    """Present 1.0; absent 0.5 and -3; ignored 9. Pairs: relu(1 - 1 + 0.5) + relu(1 - 1 - 3) = 0.5."""
    for function in LOSSES["ranking"]:
        assert function(torch.tensor([[1.0, 0.5, -3, 9]]), torch.tensor([[1, 0, 0, -1]])).item() == pytest.approx(0.5)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_leave_the_world_alone(name):
    """Inputs unchanged, gradients not switched back on, works under no_grad, non-contiguous input."""
    logits, targets = case(7, 9)
    before = logits.detach().clone()
    with torch.no_grad():
        value = LOSSES[name][1](logits, targets)
        assert not torch.is_grad_enabled() and not value.requires_grad
    torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0)
    wide = logits.detach().T.contiguous().T.requires_grad_()
    same(*LOSSES[name], [wide], [targets])


def test_asymmetric_blocks_that_do_not_divide(monkeypatch):
    monkeypatch.setattr(rp._AsymmetricLoss, "BLOCK", 10)
    logits, targets = case(7, 9)
    same(*LOSSES["asymmetric"], [logits], [targets])


def head_case(runs, batch, hidden, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((runs, batch, hidden), (runs, classes, hidden), (runs, classes))]
    return tensors, case(runs, batch, classes, seed=seed + 1)[1]


@pytest.mark.parametrize("block", [1, 13, 2 ** 19])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 5, 3, 11), (3, 4, 6, 7)])
@pytest.mark.parametrize("exponents", [(), (2.0, 1.0, 0.1)])
def test_classifier_loss_fused_equals_reference(monkeypatch, sizes, block, exponents):
    monkeypatch.setattr(rp._ClassifierLoss, "BLOCK", block)
    tensors, targets = head_case(*sizes)
    same(rp.classifier_loss_reference, rp.classifier_loss_fused, tensors, [targets, *exponents])


def test_classifier_loss_gradcheck_and_frozen_parts():
    tensors, targets = head_case(2, 3, 4, 5)
    assert torch.autograd.gradcheck(lambda *t: rp.classifier_loss_fused(*t, targets), tensors)
    frozen = [tensors[0], tensors[1].detach(), tensors[2].detach()]
    (theirs,), (mine,) = (torch.autograd.grad(f(*frozen, targets), frozen[:1]) for f in (rp.classifier_loss_reference, rp.classifier_loss_fused))
    torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(rp.classifier_loss_fused(*tensors, targets), rp.classifier_loss_reference(*tensors, targets))
    loss = rp.classifier_loss_fused(*tensors, targets)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(3 * loss, tensors)):
        torch.testing.assert_close(3 * a, b)  # asking twice does not scale twice


def saved_bytes(function):
    """Bytes that autograd keeps for the backward pass."""
    seen = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()), t)[1], lambda t: t):
        function()
    return sum(seen.values())


def test_fused_saves_an_eighth_at_ten_thousand_labels():
    """Counted bytes, not wall time: the fused step keeps the gradients it needs, the reference keeps the B x C tensors."""
    tensors, targets = [t.detach().float().requires_grad_() for t in head_case(1, 512, 256, 10000)[0]], head_case(1, 512, 1, 10000)[1]
    inputs = sum(t.untyped_storage().nbytes() for t in tensors) + targets.untyped_storage().nbytes()
    reference = saved_bytes(lambda: rp.classifier_loss_reference(*tensors, targets)) - inputs
    fused = saved_bytes(lambda: rp.classifier_loss_fused(*tensors, targets))
    assert fused * 8 < reference, (fused, reference)


# --- random perturbation ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("law", ["gaussian", "uniform", "sphere", "none"])
@pytest.mark.parametrize("std", [0.0, 0.15, torch.tensor([0.1, 0.2])[:, None, None].double()])
def test_perturb_fused_equals_reference(law, std):
    embeddings = torch.randn(1, 33, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = embeddings.clone()
    one, two = (function(embeddings, std, law, 5.0, torch.Generator().manual_seed(3)) for function in (rp.perturb_reference, rp.perturb_fused))
    torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)
    assert torch.equal(embeddings, before) and one.shape == two.shape == (torch.broadcast_shapes((1, 33, 12), getattr(std, "shape", ())))
    leaf = embeddings.clone().requires_grad_()
    for function in (rp.perturb_reference, rp.perturb_fused):
        assert torch.autograd.gradcheck(lambda t: function(t, std, law, 5.0, torch.Generator().manual_seed(3)), [leaf[:, :3]])


@pytest.mark.parametrize("law", ["gaussian", "uniform", "sphere"])
def test_noise_has_the_stated_size(law):
    """Standard deviation per coordinate = noise_std * mean_norm, mean 0, for every law; sphere: every row the same length."""
    embeddings = torch.zeros(4000, 24, dtype=torch.float64)
    noise = rp.perturb(embeddings, 0.1, law, 7.0, torch.Generator().manual_seed(1))
    assert noise.std().item() == pytest.approx(0.7, rel=0.01) and abs(noise.mean().item()) < 0.01
    if law == "sphere":
        torch.testing.assert_close(noise.norm(dim=1), torch.full((4000,), 0.7 * math.sqrt(24), dtype=torch.float64))
    if law == "uniform":
        assert noise.abs().max() <= 0.7 * math.sqrt(3)


def test_noise_none_and_unknown():
    embeddings = torch.randn(3, 4)
    assert torch.equal(rp.perturb(embeddings, 0.5, "none", 1.0, None), embeddings)
    for function in (rp.perturb_reference, rp.perturb_fused):
        with pytest.raises(ValueError, match="unknown noise law"):
            function(embeddings, 0.5, "cauchy", 1.0, None)


# --- adapter ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_per_label_adapter_is_the_formula(kind):
    adapter = rp.Adapter(6, 5, [0, 7], kind).double()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    for run in range(2):
        hidden = torch.relu(x[run] @ adapter.w1[run].T + adapter.b1[run]) if kind == "mlp" else x[run]
        expected = hidden @ adapter.w2[run].T + (adapter.b2[run] if kind == "mlp" else 0)
        torch.testing.assert_close(adapter(x)[run], expected)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * ((6 * 12 + 12 + 12 * 5 + 5) if kind == "mlp" else 6 * 5)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_label_embedding_head_is_the_formula(kind):
    adapter, labels, x = rp.Adapter(6, 5, [0], kind, "label-embedding").double(), torch.randn(9, 6, dtype=torch.float64), torch.randn(1, 4, 6, dtype=torch.float64)
    change = torch.relu(x[0] @ adapter.w1[0].T + adapter.b1[0]) @ adapter.w2[0].T + adapter.b2[0] if kind == "mlp" else x[0] @ adapter.w2[0].T
    expected = 20 * F.cosine_similarity((x[0] + change)[:, None], labels[None], dim=-1)
    torch.testing.assert_close(adapter(x, labels)[0], expected)  # nine labels, though built for five


def inputs_of(texts=300, width=10, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(texts, classes, generator=generator) < 0.3).to(torch.int8)
    directions = torch.randn(classes, width, generator=generator)
    return rp.Inputs([f"label {n}" for n in range(classes)], directions, labels.float() @ directions + 0.3 * torch.randn(texts, width, generator=generator), labels,
                     None, None, "", "", "", "")


def trained(tmp_path, *words):
    config = rp.parse(["--cpu", "--quiet", "--epochs", "3", "--batch-size", "64", *words])
    return rp.train(config, inputs_of(), torch.device("cpu"), tmp_path)[0]


@pytest.mark.parametrize("words", [(), ("--head", "label-embedding"), ("--adapter", "linear"), ("--loss", "bce"), ("--loss", "ranking"), ("--normalize",), ("--noise-law", "sphere")])
def test_training_fused_equals_reference(tmp_path, words):
    """Same seeds, three epochs: the learned tensors agree."""
    one, two = (trained(tmp_path, "--impl", impl, "--seed", "0", "1", *words).state_dict() for impl in ("fused", "reference"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=2e-4, atol=2e-5)


def test_a_run_learns_the_same_alone_or_beside_others(tmp_path):
    together = trained(tmp_path, "--seed", "0", "3", "--noise-std", "0.2", "0", "0.1")
    for position, (seed, std) in enumerate([(s, n) for s in (0, 3) for n in (0.2, 0, 0.1)]):
        alone = trained(tmp_path, "--seed", str(seed), "--noise-std", str(std))
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(tensor[0], together.state_dict()[name][position], rtol=1e-4, atol=1e-5)


def test_mixed_scores_by_hand():
    """One photo, cosines 1 and 0: standardised +1 and -1; half of sigmoid(+-1), half of sigmoid(logit)."""
    config = rp.parse(["--zero-shot-weight", "0.5"])
    scores = rp.mixed_scores(config, torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]]))
    sigmoid = lambda z: 1 / (1 + math.exp(-z))
    np.testing.assert_allclose(scores.numpy(), [[(0.5 + sigmoid(1)) / 2, (sigmoid(2) + sigmoid(-1)) / 2]], rtol=1e-6)


def test_every_setting_is_read():
    """No dead option: every field of Config is used outside its own declaration."""
    source = inspect.getsource(rp).split("class Diverged")[1]
    for name in (field.name for field in rp.dataclasses.fields(rp.Config)):
        assert f"config.{name}" in source or f'"{name}"' in source, name
