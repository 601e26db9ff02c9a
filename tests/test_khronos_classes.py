"""KHRONOS for classes: fits, probabilities, weights, and what is refused."""

import numpy as np
import pytest
import torch

from leviathan import KhronosConfig, KhronosForClassification
from tests.test_khronos import HIGH, LOW, points


def labelled(num_points):
    x = points(num_points)
    u = (x - LOW) / (np.array(HIGH) - LOW)
    return x, ((u[:, 0] - 0.5) * (u[:, 1] - 0.5) > 0).astype(int) + 2 * (u[:, 2] > 0.7)


def classifier(**options):
    torch.manual_seed(0)
    config = KhronosConfig(input_low=LOW, input_high=HIGH, rank=4, num_cells=4, num_labels=4, **options)
    return KhronosForClassification(config)


def test_classes_that_depend_on_products(tmp_path):
    x, labels = labelled(600)
    model = classifier()
    result = model.fit(x[:400], labels[:400], num_restarts=1)
    assert result.accuracy > 0.97
    assert (model.predict(x[400:]) == labels[400:]).mean() > 0.9
    probabilities = model.predict_proba(x)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    output = model(torch.as_tensor(x[:400]).float(), torch.as_tensor(labels[:400]))
    assert output.loss.item() == pytest.approx(result.cross_entropy, rel=1e-3)
    assert result.objective > result.cross_entropy
    model.save_pretrained(tmp_path)
    loaded, info = KhronosForClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    np.testing.assert_array_equal(loaded.predict_proba(x), probabilities)


def test_fits_of_classes_end_where_the_gradient_vanishes():
    x, labels = labelled(60)
    result = classifier().double().fit(x, labels, ridge=1e-2, num_restarts=1)
    assert result.converged
    less = classifier().double().fit(x, labels, ridge=1e-4, num_restarts=1)
    assert less.cross_entropy < result.cross_entropy


def test_a_class_weight_of_two_is_the_point_twice():
    x, labels = labelled(40)
    weight = np.random.default_rng(0).integers(0, 4, len(x))
    order = np.random.default_rng(1).permutation(len(x))
    weighted, repeated = classifier().double(), classifier().double()
    options = {"num_restarts": 1, "max_iterations": 30}
    weighted.fit(x[order], labels[order], sample_weight=weight[order], **options)
    repeated.fit(x.repeat(weight, 0), labels.repeat(weight), **options)
    np.testing.assert_array_equal(weighted.predict_proba(x), repeated.predict_proba(x))


def test_bad_labels_raise():
    x, labels = labelled(20)
    for wrong, message in (
        (labels - 1, r"labels\[\d+\] = -1; expected integers from 0 to 3"),
        (labels + 0.5, "expected integers"),
        (labels[:-1], "x has 20 rows and y has 19"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier().fit(x, wrong)
    with pytest.raises(ValueError, match="num_labels = 1; expected at least 2"):
        KhronosForClassification(KhronosConfig(num_labels=1))
    for name, value in (("ridge", -1.0), ("num_restarts", 0), ("max_iterations", 2.5)):
        with pytest.raises(ValueError, match=f"{name} = {value}"):
            classifier().fit(x, labels, **{name: value})
