"""A thousand of the random calls of fuzz.py, and the proof that it sees what is wrong."""

import pytest
import torch
from fuzz import Case, check

import fusednorm
from fusednorm import functional

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def first_failure(numbers):
    for number in numbers:
        try:
            check(Case(number))
        except AssertionError as error:
            return error
    return None


def test_cases():
    assert first_failure(range(1000)) is None


def test_a_case_is_its_number():
    assert str(Case(77)) == str(Case(77)) != str(Case(78))


call = functional.batch_norm_act_drop


def wrong_eps(*args, **options):
    return call(*args[:-1], args[-1] * 1.1, **options)


def wrong_seed(*args, seed, **options):
    return call(*args, seed=seed ^ 1, **options)


def wrong_gradient(*args, **options):
    y = call(*args, **options)
    return y + 0.001 * (y - y.detach())


def wrong_value_at_the_end(*args, **options):
    y = call(*args, **options)
    bump = torch.zeros_like(y)
    bump[(-1,) * bump.dim()] = 0.05
    return y + bump


def without_bias_gradient(x, mean, var, weight, bias, *args, **options):
    bias = bias if bias is None else bias.detach() + 0 * bias
    return call(x, mean, var, weight, bias, *args, **options)


def unmatched(*args, eval_matched_stats, **options):
    return call(*args, eval_matched_stats=False, **options)


def whole_batch(*args, ghost_batch_size, **options):
    return call(*args, ghost_batch_size=None, **options)


FAULTS = (
    wrong_eps,
    wrong_seed,
    wrong_gradient,
    wrong_value_at_the_end,
    without_bias_gradient,
    unmatched,
    whole_batch,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_it_bites(fault, monkeypatch):
    monkeypatch.setattr(functional, "batch_norm_act_drop", fault)
    assert first_failure(range(300)) is not None


def test_a_wrong_noise_is_seen(monkeypatch):
    right = fusednorm.noise
    monkeypatch.setattr(fusednorm, "noise", lambda *a, **o: right(*a, **o) * 1.01)
    assert first_failure(range(300)) is not None
