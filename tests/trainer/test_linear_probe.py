"""The linear probe against slow gradients, a Newton solver, and known answers."""

import math

import pytest
import torch
from slow_reference import model_spec
from trainer_run import write_images

from fastmim.config import ConfigError
from fastmim.evaluate import knn, linear


def blobs(n, d, classes, seed=0, noise=1.0):
    """(N, D) features around one center per class, and their labels."""
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=g)
    return centers[labels] + noise * torch.randn(n, d, generator=g), labels


def slow_objective(weight, rows, labels, decay):
    """Mean cross entropy + decay / 2 x squared weights without the biases, image by image, in float64."""
    total = 0.0
    for row, label in zip(rows.double(), labels.tolist()):
        scores = weight[0] + row @ weight[1:]
        total = total + torch.log(torch.exp(scores).sum()) - scores[label]
    return total / len(rows) + decay / 2 * (weight[1:] ** 2).sum()


@pytest.mark.parametrize("decay", [1.0, 1e-2, 1e-4])
def test_fit_is_the_minimum_of_the_written_out_objective(decay):
    """The gradient vanishes there, and a step in any direction goes up: the objective is convex."""
    x, y = blobs(60, 5, 3, noise=2.0)
    rows = linear.Standardize(x)(x)
    weight = linear.fit(rows, y, 3, decay).double().requires_grad_(True)
    value = slow_objective(weight, rows, y, decay)
    value.backward()
    assert weight.grad.abs().max() < 1e-4
    g = torch.Generator().manual_seed(1)
    for _ in range(5):
        step = 0.05 * torch.randn(weight.shape, generator=g, dtype=torch.float64)
        assert slow_objective(weight.detach() + step, rows, y, decay) > value


def test_fit_of_two_classes_equals_newtons_method():
    """With two classes the difference of the columns solves binary logistic regression with half the decay on it."""
    x, y = blobs(80, 4, 2, noise=1.5)
    rows, decay = linear.Standardize(x)(x), 0.05
    fitted = linear.fit(rows, y, 2, decay).double()
    design = torch.cat([torch.ones(80, 1), rows], 1).double()
    ridge = torch.full((5,), decay / 2, dtype=torch.float64)
    ridge[0] = 0
    beta = torch.zeros(5, dtype=torch.float64)
    for _ in range(30):
        p = torch.sigmoid(design @ beta)
        gradient = design.T @ (p - y) / 80 + ridge * beta
        hessian = design.T @ (design * (p * (1 - p) / 80)[:, None]) + torch.diag(ridge)
        beta = beta - torch.linalg.solve(hessian, gradient)
    torch.testing.assert_close(fitted[:, 1] - fitted[:, 0], beta, rtol=1e-2, atol=2e-3)


def test_fit_in_chunks_is_the_fit_in_one_piece(monkeypatch):
    x, y = blobs(50, 3, 4)
    rows = linear.Standardize(x)(x)
    whole = linear.fit(rows, y, 4, 1e-2)
    monkeypatch.setattr(linear, "CHUNK", 7)
    torch.testing.assert_close(linear.fit(rows, y, 4, 1e-2), whole, rtol=1e-3, atol=1e-4)
    right = sum(int(scores.argmax()) == label for scores, label in zip(linear.logits(whole, rows), y.tolist()))
    assert linear.accuracy(whole, rows, y) == right / 50


def test_standardize_is_batch_norm_without_affine_map():
    x = blobs(40, 6, 2)[0] * torch.tensor([1.0, 5, 0.1, 1, 1, 0]) + 3
    norm = torch.nn.BatchNorm1d(6, eps=1e-6, affine=False)
    torch.testing.assert_close(linear.Standardize(x)(x), norm(x), rtol=1e-4, atol=1e-4)


def test_probe_of_separable_useless_and_shifted_features():
    labels = torch.arange(300) % 10
    one_hot = torch.nn.functional.one_hot(labels).float()
    assert linear.probe(one_hot, labels, one_hot, labels).top1 == 1.0
    assert linear.probe(one_hot, labels, one_hot, (labels + 1) % 10).top1 == 0.0
    # Standardized by the training set's numbers: scale and shift of a feature do not matter.
    x, y = blobs(400, 6, 3, seed=1)
    v, vy = blobs(200, 6, 3, seed=2)
    plain = linear.probe(x, y, v, vy)
    moved = linear.probe(1e3 * x - 7e3, y, 1e3 * v - 7e3, vy)
    assert moved.top1 == pytest.approx(plain.top1, abs=0.011) and moved.weight_decay == plain.weight_decay
    noise = torch.randn(400, 6, generator=torch.Generator().manual_seed(3))
    assert linear.probe(noise, y, noise[:200], vy).top1 == pytest.approx(1 / 3, abs=5 * math.sqrt(2 / 9 / 200))


def test_probe_reads_a_linear_direction_that_nearest_neighbors_miss():
    """One small feature tells the classes apart among fifty large ones."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 2
    x = 10 * torch.randn(600, 50, generator=g)
    x[:, 7] = 0.1 * (2 * labels - 1) + 0.02 * torch.randn(600, generator=g)
    parts = x[:400], labels[:400], x[400:], labels[400:]
    assert linear.probe(*parts).top1 > 0.95 > 0.7 > knn.top1(*parts)


def test_probe_chooses_the_weight_decay_on_held_out_training_images(monkeypatch):
    """More features than images: without decay the probe fits noise. Validation labels never matter for the choice."""
    x, y = blobs(60, 200, 2, noise=6.0)
    v, vy = blobs(400, 200, 2, seed=5, noise=6.0)
    found = linear.probe(x, y, v, vy)
    assert found.weight_decay in linear.WEIGHT_DECAYS
    again = linear.probe(x, y, v, 1 - vy)
    assert (again.weight_decay, again.held_out) == (found.weight_decay, found.held_out)
    assert again.top1 == pytest.approx(1 - found.top1)
    # By hand: each tenth image in the order of the classes.
    order = sorted(range(60), key=lambda i: (int(y[i]), i))
    held = [i for place, i in enumerate(order) if place % 10 == 9]
    rest = [i for i in order if i not in held]
    norm = linear.Standardize(x[rest])
    reached = {
        decay: linear.accuracy(linear.fit(norm(x[rest]), y[rest], 2, decay), norm(x[held]), y[held])
        for decay in linear.WEIGHT_DECAYS
    }
    assert found.held_out == pytest.approx(max(reached.values()), abs=0.17)
    monkeypatch.setattr(linear, "WEIGHT_DECAYS", (found.weight_decay,))
    assert linear.probe(x, y, v, vy).top1 == found.top1, "the final fit uses all training images and the chosen decay"


def test_probe_repeats_and_draws_nothing():
    x, y = blobs(100, 8, 4)
    state = torch.get_rng_state()
    assert linear.probe(x, y, x, y) == linear.probe(x, y, x, y)
    assert torch.equal(torch.get_rng_state(), state)


def test_probe_works_inside_no_grad_and_for_classes_that_validation_alone_has():
    x, y = blobs(50, 4, 2)
    with torch.no_grad():
        assert linear.probe(x, y, x[:4], torch.tensor([0, 1, 2, 5])).top1 <= 0.5


def test_probe_of_too_few_images_says_so():
    x, y = blobs(9, 4, 2)
    with pytest.raises(ConfigError, match="at least 10 training images, got 9"):
        linear.probe(x, y, x, y)


def test_measure_reads_folders_and_uses_the_training_part_alone_to_fit(tmp_path):
    from fastmim_pipelines.index import FolderIndex

    train = FolderIndex(write_images(tmp_path / "train", 12))
    val = FolderIndex(write_images(tmp_path / "val", 4, seed=1), classes=train.classes)
    model, device = model_spec(16, 16, 4, 3, "vit_pico"), torch.device("cpu")

    def brightness(images):
        return images.float().mean((2, 3))

    found = linear.measure(brightness, train, val, model, device, batch_size=5, workers=0)
    sides = linear.labeled_features(brightness, train, val, model, device, workers=0)
    assert [len(side) for side in sides] == [36, 36, 12, 12] and linear.probe(*sides) == found
    # The class is the brightness, up to some noise.
    assert found.top1 > 0.5
    few = linear.labeled_features(brightness, train, val, model, device, workers=0, limit=15)
    assert [len(side) for side in few] == [15, 15, 12, 12]
