"""The checks of the exercises: right answers pass, wrong ones fail with a hint that does not give the solution."""

import math

import numpy as np
import pytest
import torch

from probattn import CausalAttention
from probattn.teach import exercises
from probattn.teach.exercises import Feedback, corners

ATTENTION = CausalAttention.from_qk_matrix(torch.tensor([[0.4, 0.3], [-0.2, 0.1]]).double())
U = torch.tensor([[0.3, -1.0], [1.2, 0.4], [-0.7, 0.6], [0.1, 0.2]]).double()
WHOLE = torch.func.jacrev(lambda x: x - ATTENTION.mean(x))(U).reshape(8, 8)


def block(A, past, u):
    alpha = torch.softmax(past @ A @ u, 0)
    centred = past - alpha @ past
    return torch.eye(len(u)).double() - (alpha[:, None] * centred).mT @ centred @ A


def unweighted(A, past, u):
    return torch.eye(len(u)).double() - torch.cov(past.mT, correction=0).reshape(len(u), len(u)) @ A


def reversed_factors(A, past, u):
    return torch.eye(len(u)).double() - A @ (torch.eye(len(u)).double() - block(A, past, u)) @ torch.linalg.inv(A)


def count(a, eps):
    if a <= 1:
        return 1
    turn = math.acosh(math.sqrt(a)) / a
    return 3 if abs(eps) < abs(turn - math.tanh(a * turn)) else 1


def mass(modulus=True, sigma=0.5):
    u = np.linspace(-6, 6, 20001)
    slope = 1 - 3 / np.cosh(3 * u) ** 2
    density = np.exp(-0.5 * ((u - np.tanh(3 * u)) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    return float((density * (np.abs(slope) if modulus else slope)).sum() * (u[1] - u[0]))


def previous(A, u):
    rows = [u[0], *(u[i] - torch.softmax(u[:i] @ A @ u[i - 1], 0) @ u[:i] for i in range(1, len(u)))]
    return torch.stack(rows)


def stable(a=0.1):
    v = 1.0
    for _ in range(200):
        v = 1 / (1 - a * v) ** 2
    return v


def unstable(a=0.1):
    return next(r.real for r in np.roots([a**2, -2 * a, 1, -1]) if 1 / (3 * a) < r.real < 1 / a)


def triangularity(answer):
    return exercises.check_triangularity(answer, ATTENTION, U)


RIGHT = {
    "block": (exercises.check_block, block),
    "triangularity": (triangularity, WHOLE),
    "fold": (exercises.check_fold, 4 / 9),
    "roots": (exercises.check_roots, count),
    "mass": (exercises.check_mass, mass()),
    "determinant": (exercises.check_determinant, torch.diag(torch.tensor([-39.0, 1 - 1 / 40]).double())),
    "stationary": (exercises.check_stationary, stable()),
    "previous query": (exercises.check_previous_query, previous),
}

# What each wrong answer is told to look at.
WRONG = [
    (exercises.check_block, lambda A, past, u: torch.eye(len(u)).double(), "depend on the past"),
    (exercises.check_block, lambda A, past, u: 2 * torch.eye(len(u)).double() - block(A, past, u), "sign"),
    (exercises.check_block, lambda A, past, u: block(A, past, u).mT, "transposed"),
    (exercises.check_block, unweighted, "weighted by the attention"),
    (exercises.check_block, reversed_factors, "order of the factors"),
    (exercises.check_block, lambda A, past, u: past, "shape"),
    (exercises.check_block, lambda A, past, u: past @ past @ past, "raised RuntimeError"),
    (exercises.check_block, 3.0, "raised TypeError"),
    (triangularity, WHOLE.mT, "later token"),
    (triangularity, torch.eye(8).double() - WHOLE, "not of mu"),
    (triangularity, WHOLE - WHOLE.tril(-2), "below them"),
    (triangularity, WHOLE.view(4, 2, 4, 2), "shape"),
    (exercises.check_fold, 0.5, "already folded"),
    (exercises.check_fold, 0.4, "does not fold yet"),
    (exercises.check_fold, 16 / 9, "two points"),
    (exercises.check_fold, math.nan, "finite"),
    (exercises.check_fold, "four ninths", "one number"),
    (exercises.check_roots, lambda a, eps: 1, "a = 1.5, eps = 0"),
    (exercises.check_roots, lambda a, eps: 3 if a > 1 else 1, "eps = 0.2"),
    (exercises.check_roots, lambda a, eps: None, "whole number"),
    (exercises.check_roots, lambda a, eps: 1 / 0, "raised ZeroDivisionError"),
    (exercises.check_mass, mass(modulus=False), "sign"),
    (exercises.check_mass, mass(sigma=1.0), "check sigma"),
    (exercises.check_mass, 0.4, "never below 1"),
    (exercises.check_mass, 3, "average"),
    (exercises.check_determinant, torch.eye(2).double() * 0.5, "not 1"),
    (exercises.check_determinant, 2 * torch.eye(2).double(), "comfortable"),
    (exercises.check_determinant, torch.full((2, 2), math.inf), "not finite"),
    (exercises.check_stationary, 1.0, "0.81"),
    (exercises.check_stationary, unstable(), "stable"),
    (exercises.check_previous_query, lambda A, u: u, "token before"),
    (exercises.check_previous_query, lambda A, u: u - CausalAttention.from_qk_matrix(A).mean(u), "own query"),
    (exercises.check_previous_query, lambda A, u: previous(A, u.detach()), "another derivative"),
]


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_answer_passes(name):
    check, answer = RIGHT[name]
    assert check(answer).passed, check(answer)
    assert repr(check(answer)).startswith("right: ")


@pytest.mark.parametrize("name", RIGHT)
def test_no_answer_is_no_failure(name):
    assert RIGHT[name][0](None) == Feedback(None, "not answered yet")


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_a_wrong_answer_fails_and_is_told_where_to_look(check, answer, hint):
    feedback = check(answer)
    assert feedback.passed is False
    assert hint in feedback.message


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_no_message_gives_the_solution_away(check, answer, hint):
    for secret in ("4/9", "0.44", "2.23", "1.33", f"{mass():.2f}", f"{stable():.2f}"):
        assert secret not in check(answer).message


def test_the_determinant_exercise_has_a_unit_covariance():
    assert torch.equal(torch.cov(corners().mT, correction=0), torch.eye(2).double())
