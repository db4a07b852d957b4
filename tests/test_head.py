import copy
import functools

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifierCV
from torch import Tensor, nn

from frostline.closedform import ridge
from frostline.head import SeededDropout, build_head, seed_dropout, set_probe
from frostline.metrics import scores
from frostline.spec import Head


def parameters(head: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in head.parameters()])


@functools.cache
def digits() -> tuple[Tensor, np.ndarray, Tensor, np.ndarray]:
    """Pixels of scikit-learn's digits as 64 features: 300 to train on, 500 to test on."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images, labels = torch.from_numpy(found.data[order]).float() / 16, found.target[order]
    return images[:300], labels[:300], images[-500:], labels[-500:]


@pytest.mark.parametrize(("hidden", "count"), [(0, 24 * 10 + 10), (16, 24 * 16 + 16 + 16 * 10 + 10)])
def test_shapes_and_sizes(hidden: int, count: int) -> None:
    head = build_head(Head(hidden=hidden), 24, 10, seed=0)
    assert len(parameters(head)) == count
    assert head(torch.zeros(5, 24)).shape == (5, 10)
    assert [type(layer) for layer in head] == [*([nn.Linear, nn.ReLU] if hidden else []), SeededDropout, nn.Linear]


@pytest.mark.parametrize("hidden", [0, 16])
def test_the_seed_decides_the_weights_and_nothing_else_does(hidden: int) -> None:
    first, state = build_head(Head(hidden=hidden), 24, 10, seed=1), torch.random.get_rng_state()
    torch.rand(3)
    again, other = (build_head(Head(hidden=hidden, dropout=0.5), 24, 10, seed=seed) for seed in (1, 2))
    assert torch.equal(parameters(first), parameters(again))
    assert not torch.equal(parameters(first), parameters(other))
    torch.random.set_rng_state(state)
    build_head(Head(hidden=hidden), 24, 10, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_random_head_has_pytorchs_own_weights() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        plain = nn.Linear(24, 10)
    assert torch.equal(parameters(build_head(Head(), 24, 10, seed=5)), parameters(plain))
    assert torch.equal(parameters(build_head(Head(init="probe"), 24, 10, seed=5)), parameters(plain))


@pytest.mark.parametrize("hidden", [0, 16])
def test_a_zero_head_says_zero_and_can_learn(hidden: int) -> None:
    head = build_head(Head(hidden=hidden, init="zero"), 24, 10, seed=0)
    logits = head(torch.randn(5, 24))
    assert torch.equal(logits, torch.zeros(5, 10))
    nn.functional.cross_entropy(logits, torch.arange(5)).backward()
    out = head[-1]
    assert isinstance(out, nn.Linear)
    assert out.weight.grad is not None
    assert out.weight.grad.abs().sum() > 0


def test_dropout_is_for_training_only() -> None:
    inputs = torch.ones(4, 24)
    head = build_head(Head(hidden=64, dropout=0.5), 24, 10, seed=0)
    assert not torch.equal(head.train()(inputs), head(inputs))
    assert torch.equal(head.eval()(inputs), head(inputs))
    whole = build_head(Head(hidden=64), 24, 10, seed=0)
    assert torch.equal(head(inputs), whole.train()(inputs))


def test_dropout_draws_from_its_own_stream_only() -> None:
    inputs, state = torch.ones(7, 24), torch.random.get_rng_state()
    head, twin, other = (build_head(Head(dropout=0.5), 24, 10, seed=0) for _ in range(3))
    for module, seed in ((head, 5), (twin, 5), (other, 6)):
        seed_dropout(module, seed)
    first, second = head(inputs), head(inputs)
    torch.rand(3)
    assert torch.equal(twin(inputs), first)
    assert torch.equal(twin.eval()(inputs), head.eval()(inputs))  # which draws nothing
    assert torch.equal(twin.train()(inputs), second)
    assert not torch.equal(first, second)
    assert not torch.equal(other(inputs), first)
    seed_dropout(head, 5)
    assert torch.equal(head.train()(inputs), first)
    torch.random.set_rng_state(state)
    head(inputs)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_copy_of_a_head_draws_on_where_it_stood() -> None:
    head, inputs = build_head(Head(dropout=0.5), 24, 10, seed=0), torch.ones(4, 24)
    head(inputs)
    twin = copy.deepcopy(head)
    assert torch.equal(head(inputs), twin(inputs))
    assert set(head.state_dict()) == {"1.weight", "1.bias"}


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 1 - 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_drops_its_share_and_scales_the_rest(p: float, dtype: torch.dtype) -> None:
    inputs = torch.ones(999, 101, dtype=dtype)
    outputs = SeededDropout(p)(inputs)
    dropped = min(round(p * 65536), 65535) / 65536
    assert outputs.dtype == dtype
    assert set(outputs.unique().tolist()) <= {0.0, float(torch.tensor(1 / (1 - dropped), dtype=dtype))}
    spread = (dropped * (1 - dropped) / inputs.numel()) ** 0.5
    assert float((outputs == 0).double().mean()) == pytest.approx(dropped, abs=5 * spread)
    assert SeededDropout(0.0)(inputs) is inputs


def test_a_probe_of_digits_is_as_good_as_scikit_learns_ridge_and_far_better_than_a_random_head() -> None:
    inputs, labels, test_inputs, test_labels = digits()
    head = build_head(Head(init="probe"), 64, 10, seed=0).eval()
    before = scores(head(test_inputs).detach().numpy(), test_labels)
    set_probe(head, inputs, torch.from_numpy(labels))
    after = scores(head(test_inputs).detach().numpy(), test_labels)
    theirs = RidgeClassifierCV().fit(inputs.numpy(), labels).score(test_inputs.numpy(), test_labels)  # 0.916
    assert before["accuracy"] < 0.2
    assert before["nll"] > 2.2
    assert after["accuracy"] == pytest.approx(0.922, abs=0.005)
    assert after["accuracy"] > theirs
    assert after["nll"] == pytest.approx(0.254, abs=0.01)


def test_a_probe_does_not_depend_on_what_the_head_was() -> None:
    inputs, labels, _, _ = digits()
    heads = [build_head(Head(init="probe"), 64, 10, seed=seed) for seed in (0, 1)]
    for head in heads:
        set_probe(head, inputs, torch.from_numpy(labels))
    assert torch.equal(parameters(heads[0]), parameters(heads[1]))
    assert all(parameter.requires_grad for parameter in heads[0].parameters())


@pytest.mark.parametrize(
    "inputs", [torch.ones(6, 4), torch.zeros(6, 4), torch.zeros(3, 8), torch.full((6, 4), 1e-8), torch.eye(4)[[0] * 6]]
)
def test_features_that_say_nothing_give_the_shares_of_the_classes(inputs: Tensor) -> None:
    labels = np.array([0, 1, 1, 2, 1, 0])[: len(inputs)]
    head = build_head(Head(init="probe"), inputs.shape[1], 3, seed=0)
    set_probe(head, inputs, torch.from_numpy(labels))
    logits = head(inputs).detach()
    assert torch.isfinite(parameters(head)).all()
    np.testing.assert_allclose(logits.numpy(), logits[:1].expand_as(logits).numpy(), atol=1e-6)


def test_one_sample_gives_finite_weights() -> None:
    head = build_head(Head(init="probe"), 4, 2, seed=0)
    set_probe(head, torch.ones(1, 4), torch.tensor([1]))
    assert torch.isfinite(parameters(head)).all()
    assert head(torch.ones(1, 4)).argmax() == 1


def test_the_probe_of_an_mlp_is_the_ridge_on_its_hidden_layer() -> None:
    inputs, labels, test_inputs, test_labels = digits()
    head = build_head(Head(hidden=256, dropout=0.5, init="probe"), 64, 10, seed=0).eval()
    hidden, bias = head[0].weight.detach().clone(), head[0].bias.detach().clone()
    set_probe(head, inputs, torch.from_numpy(labels))
    assert torch.equal(head[0].weight, hidden)
    assert torch.equal(head[0].bias, bias)
    solution = ridge(nn.functional.relu(inputs @ hidden.T + bias), torch.from_numpy(labels), 10)
    np.testing.assert_allclose(head[-1].weight.detach().numpy(), solution.weight.numpy(), rtol=1e-3, atol=1e-3)
    assert scores(head(test_inputs).detach().numpy(), test_labels)["accuracy"] > 0.93, "more than of the pixels alone"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_probe_of_60_000_samples_takes_no_minutes() -> None:
    labels = np.random.default_rng(0).integers(0, 10, 60_000)
    inputs = torch.randn(60_000, 1280)
    inputs[np.arange(60_000), labels] += 2
    head = build_head(Head(init="probe"), 1280, 10, seed=0)
    set_probe(head, inputs, torch.from_numpy(labels))
    assert scores(head(inputs).detach().numpy(), labels)["accuracy"] > 0.5
