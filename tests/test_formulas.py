"""The formulas of both papers on numbers that can be checked with a pencil; each plain function and its fused twin.

Read it with the PDF open: a test is an equation, and its docstring the calculation. log 3 is the logit of 3/4.
"""
from math import log, sqrt

import pytest
import torch
from conftest import table

import adapter_rp as rp
import sspa

LOG3 = log(3)


@pytest.fixture(params=["reference", "fused"])
def impl(request):
    return request.param


def matrix(rows):
    """"1 0; 0 1" -> float64 [2, 2]"""
    return torch.tensor(table(rows))


def equal(found, *expected):
    assert found.flatten().tolist() == pytest.approx(expected)


@pytest.fixture(params=[sspa.asymmetric_loss_reference, sspa.asymmetric_loss_fused, rp.asymmetric_loss_reference])
def loss(request):
    return request.param


# --- both papers: asymmetric loss -------------------------------------------------------------------------------------

def test_loss_is_summed_over_labels_and_averaged_over_the_batch(loss):
    """Two images, two labels, p = 1/2, gamma- = 0; three are absent, one is ignored:  3 log 2 / 2 images"""
    targets = torch.tensor([[0, 0], [0, -1]])
    equal(loss(matrix("0 0; 0 0"), targets, gamma_neg=0.0), 3 * log(2) / 2)


def test_loss_of_a_present_and_an_absent_label(loss):
    """present: -(1 - p)^gamma+ log p;  p = 3/4, gamma+ = 1:  -(1/4) log(3/4)
    absent: -q^gamma- log(1 - q), q = max(p - clip, 0);  clip = 1/4, q = 1/2, gamma- = 2:  -(1/4) log(1/2)
    Gradients, weights stopped, dp/dz = 3/16: -(1/4)(1/4) and (1/2)^2 (3/16) / (1/2).
    Else with d/dz of the weights: (1/4)(3/4 log(3/4) - 1/4) and (1/4)(2 + 4 log 2)(3/16)"""
    stopped = [-1 / 16, 3 / 32]
    full = [(3 / 4 * log(3 / 4) - 1 / 4) / 4, 3 / 64 * (2 + 4 * log(2))]
    for focal_gradient, expected in (("stopped", stopped), ("full", full)):
        logits = (matrix("1 1") * LOG3).requires_grad_()
        found = loss(logits, torch.tensor([[1, 0]]), gamma_neg=2.0, gamma_pos=1.0, clip=0.25,
                     focal_gradient=focal_gradient)
        equal(found, -1 / 4 * log(3 / 4) - 1 / 4 * log(1 / 2))
        found.backward()
        equal(logits.grad, *expected)


def test_loss_refuses_odd_targets_and_sums_half_precision(loss):
    logits = torch.full((512, 1000), 3.0)
    absent = logits < 0
    for odd in (logits, absent[0]):
        with pytest.raises(ValueError, match="targets must be integers or bool"):
            loss(logits, odd)
    torch.testing.assert_close(loss(logits.half(), absent), loss(logits, absent), rtol=1e-4, atol=0)


# --- SSPA -------------------------------------------------------------------------------------------------------------

def test_dsf():
    """T_ca = softmax(scale * (E_ca W + b) X^T) X.  Regions (1, 0) and (0, 1); prompt (0, 1), W swaps, b = (1, 0):
    (2, 0); scale = log 3 / 2: logits log 3 and 0, weights 3/4 and 1/4"""
    dsf = sspa.DynamicSemanticFiltering(2, LOG3 / 2).double()
    dsf.weight.data = matrix("0 1; 1 0")
    dsf.bias.data = matrix("1 0")
    T_ca, attention = dsf(matrix("0 1"), matrix("1 0; 0 1")[None])
    equal(attention, 3 / 4, 1 / 4)
    equal(T_ca, 3 / 4, 1 / 4)


def test_quaternion_product(impl):
    """Weight 1 + 2i + 3j + 4k times input 5 + 6i + 7j + 8k, by ij = k = -ji, jk = i, ki = j, ii = jj = kk = -1:
    r: 5 - 12 - 21 - 32;  i: 6 + 10 + 24 - 28;  j: 7 - 16 + 15 + 24;  k: 8 + 14 - 18 + 20;  a bias of 1 is added"""
    layer = getattr(sspa, f"quaternion_linear_{impl}")
    weights = matrix("1; 2; 3; 4")[..., None]
    components = matrix("5; 6; 7; 8")[..., None]
    equal(layer(components, *weights, torch.tensor(1)), -59, 13, 31, 25)


def test_quaternion_init():
    """s^2 = 1 / (2 (600 + 400)), modulus s chi(4): mean square 4 s^2, mean fourth power 24 s^4; half of the square is
    the real weight's, a sixth each imaginary one's"""
    weights = torch.stack(sspa.quaternion_init(600, 400, torch.Generator().manual_seed(0))) * sqrt(2000)
    squares = weights ** 2
    assert squares.mean((1, 2)).tolist() == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3], rel=0.02)
    assert squares.sum(0).square().mean() == pytest.approx(24, rel=0.02)
    assert weights.mean((1, 2)).tolist() == pytest.approx([0] * 4, abs=0.02)


def test_quaternion_fusion(impl):
    """Q = 0 + T_ka i + T_ca j + x0 k.  Layer 1 is the identity, then ReLU: T_ka (3, -4) -> (3, 0), T_ca (2, -9) ->
    (2, 0), x0 (5, -7) -> (5, 0); the last layer adds up each component"""
    fusion = sspa.QuaternionFusion(4, 2, impl, torch.Generator()).double()
    for parameter in fusion.parameters():
        parameter.data.zero_()
    fusion.layers[0].r_weight.data.fill_diagonal_(1)
    fusion.last.r_weight.data.fill_(1)
    found = fusion(matrix("3 -4 0 0"), matrix("2 -9 0 0")[None], matrix("5 -7 0 0"))
    equal(found, 0, 3, 2, 5)


def test_gated_attention(impl):
    """x + g a.  x = (1, 0), W_Q swaps: (0, 1); regions (1, 0), (0, 1), scale log 3: attention 1/4, 3/4; values twice
    the regions: a = (1/2, 3/2).  Gate of channel 1: x_1 weighs 2 log 3, bias -log 3: 3/4;  of channel 2: a_2 weighs
    -2/3 log 3: 1/4"""
    gdma = sspa.GatedAttention(2, LOG3, True, impl, torch.Generator()).double()
    gdma.query.data = matrix("0 1; 1 0")
    gdma.value.data = matrix("2 0; 0 2")
    gdma.gate_query.data = matrix("2 0; 0 0") * LOG3
    gdma.gate_bias.data = matrix("-1 0")[0] * LOG3
    gdma.gate_attended.data = matrix("0 0; 0 -2") / 3 * LOG3
    found, gate = gdma(matrix("1 0")[None], matrix("1 0; 0 1")[None])
    equal(gate, 3 / 4, 1 / 4)
    equal(found, 1 + 3 / 4 * 1 / 2, 0 + 1 / 4 * 3 / 2)


@pytest.mark.parametrize("temperature, mean", [(1 / LOG3, 3 / 4), (1e9, 1 / 2), (1e-9, 1)])
def test_soft_aggregator(impl, temperature, mean):
    """scale * sum of softmax(S / temperature) S.  Cosines 1 and 0, temperature 1 / log 3: weights 3/4, 1/4;  8 * 3/4"""
    aggregate = getattr(sspa, f"soft_aggregate_{impl}")
    equal(aggregate(matrix("5 0")[None], matrix("2 0; 0 0.1")[None], temperature, 8), 8 * mean)


def test_scores():
    """Logits log 3 and 0: scores 3/4 and 1/2, mean 5/8"""
    logits = torch.tensor([LOG3, 0])
    for branches, score in (("both", 5 / 8), ("global", 3 / 4), ("regional", 1 / 2)):
        equal(sspa.branch_scores(branches, *logits), score)


def test_learning_rate():
    """5 of 100 steps rise in equal parts; cosine: half of the peak is left at step 50, nothing at the end"""
    rates = [sspa.warm_up_then_cosine(step, 100) for step in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=0.01)
    assert rates[50::50] == pytest.approx([0.5, 0])


# --- RP ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("law", ["gaussian", "uniform", "sphere"])
def test_noise(impl, law):
    """t + noise_std * mean_norm * n, n of variance 1 a coordinate: 0.1 * 5 = 0.5.  uniform: n up to sqrt(3);
    sphere: every n of one length"""
    perturb = getattr(rp, f"perturb_{impl}")
    generator = torch.Generator().manual_seed(0)
    noise = perturb(torch.full((4000, 24), 7.0), 0.1, law, 5.0, generator) - 7
    assert noise.std() == pytest.approx(0.5, rel=0.01)
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert (noise.max() < 0.5 * sqrt(3)) == (law == "uniform")
    assert (noise.norm(dim=1).std() < 1e-4) == (law == "sphere")


def test_adapter():
    """relu(x W1^T + b1) W2^T + b2.  x = (1, -1), W1 = 1, b1 = 0: hidden (1, 0); W2 = (3, 5), b2 = 7: 3 + 7"""
    adapter = rp.Adapter(2, 1, 0, hidden=1).double()
    adapter.w1.data = matrix("1 0; 0 1")
    adapter.b1.data.zero_()
    adapter.w2.data = matrix("3 5")
    adapter.b2.data.fill_(7)
    equal(adapter(matrix("1 -1")), 10)


def test_label_embedding_head():
    """20 cos(x + f(x), label) + bias.  x = (1, 2), linear f doubles: (3, 6); labels (2, 0), (0, 1), bias -1"""
    adapter = rp.Adapter(2, 1, 0, "linear", "label-embedding").double()
    adapter.w2.data = matrix("2 0; 0 2")
    adapter.bias.data.fill_(-1)
    equal(adapter(matrix("1 2"), matrix("2 0; 0 1")), 20 / sqrt(5) - 1, 40 / sqrt(5) - 1)


def test_ranking_loss():
    """Present 1, absent 0.5 and -3, ignored 9, margin 1:  relu(1 - 1 + 0.5) + relu(1 - 1 - 3)"""
    equal(rp.ranking_loss(matrix("1 0.5 -3 9"), torch.tensor([[1, 0, 0, -1]]), 1), 0.5)
