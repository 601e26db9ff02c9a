"""KHRONOS as scikit-learn's regressors and classifiers, for pipelines and searches.

The box of the inputs is the range of the training data; points outside of it are continued linearly, by default.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from leviathan.khronos import KhronosConfig, KhronosForClassification, KhronosModel
from leviathan.khronos.modeling import FIT_DEFAULTS
from leviathan.khronos.tables import training_data

CLASSIFICATION_DEFAULTS = {
    name: option.default for name, option in inspect.signature(KhronosForClassification.fit).parameters.items()
}


class KhronosRegressor(RegressorMixin, BaseEstimator):
    """Regression by [`~leviathan.KhronosModel`] in float64, of one or several outputs.

    Args:
        rank: Number of components of each output.
        num_cells: Cells of each input's interval.
        degree: Degree of the B-splines, 0 to 5.
        margin: Widens the box of the training data by this fraction at both ends.
        extrapolate: ``"linear"``, or ``"raise"`` an error for a point outside the box.
        ridge: Strength of the penalty; None chooses one for each output by generalised cross-validation.
        smoothness: How much variation costs in the penalty, beside size.
        num_restarts: Random starts.
        max_sweeps: Sweeps over all inputs, at most.
        tolerance: Ends once the objective falls by less than this fraction in a sweep.
        uncertainty: Whether ``predict`` can give standard deviations.
        random_state: Of the starts.

    Attributes:
        model_: The fitted [`~leviathan.KhronosModel`], which also differentiates, inverts and saves itself.
        fit_result_: Its [`~leviathan.khronos.KhronosFit`], whose ``notes`` name what the data lack.
        n_features_in_: Number of inputs.
    """

    def __init__(
        self,
        rank: int = KhronosConfig.rank,
        num_cells: int = KhronosConfig.num_cells,
        degree: int = KhronosConfig.degree,
        *,
        margin: float = 0.0,
        extrapolate: Literal["raise", "linear"] = "linear",
        ridge: float | None = FIT_DEFAULTS["ridge"],
        smoothness: float = FIT_DEFAULTS["smoothness"],
        num_restarts: int = FIT_DEFAULTS["num_restarts"],
        max_sweeps: int = FIT_DEFAULTS["max_sweeps"],
        tolerance: float = FIT_DEFAULTS["tolerance"],
        uncertainty: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ):
        self.rank = rank
        self.num_cells = num_cells
        self.degree = degree
        self.margin = margin
        self.extrapolate = extrapolate
        self.ridge = ridge
        self.smoothness = smoothness
        self.num_restarts = num_restarts
        self.max_sweeps = max_sweeps
        self.tolerance = tolerance
        self.uncertainty = uncertainty
        self.random_state = random_state

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> KhronosRegressor:
        """Fits to X (samples, features) and y (samples,) or (samples, outputs).

        Samples of weight 0 are left out, also of the box.

        Raises:
            ValueError: If a value is not finite or a shape does not fit.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        data = training_data(X, y, sample_weight)
        sizes = _whole(self, "rank", "num_cells", "degree")
        config = KhronosConfig.for_data(
            data.x, margin=self.margin, extrapolate=self.extrapolate, num_outputs=data.y.shape[1], **sizes
        )
        model = KhronosModel(config).double()
        self.fit_result_ = model.fit_checked(
            data,
            ridge=self.ridge,
            smoothness=self.smoothness,
            **_whole(self, "num_restarts", "max_sweeps"),
            tolerance=self.tolerance,
            uncertainty=self.uncertainty,
            seed=_seed(self.random_state),
        )
        self.model_ = model
        self._output_shape = y.shape[1:]
        return self

    def predict(self, X: ArrayLike, return_std: bool = False) -> NDArray | tuple[NDArray, NDArray]:
        """Predictions for X (samples, features), of the shape of y; with ``return_std`` also their standard deviations.

        Raises:
            ValueError: If a value is not finite, or outside the box while ``extrapolate="raise"``, the number of
                features differs, or there is no uncertainty to return.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        shape = (len(X), *self._output_shape)
        prediction = np.asarray(self.model_.predict(X)).reshape(shape)
        return (prediction, np.asarray(self.model_.predict_std(X)).reshape(shape)) if return_std else prediction


class KhronosClassifier(ClassifierMixin, BaseEstimator):
    """Classification by [`~leviathan.KhronosForClassification`] in float64.

    Args:
        rank: Number of components that all classes share.
        num_cells: Cells of each input's interval.
        degree: Degree of the B-splines, 0 to 5.
        margin: Widens the box of the training data by this fraction at both ends.
        extrapolate: ``"linear"``, or ``"raise"`` an error for a point outside the box.
        ridge: Strength of the penalty.
        smoothness: How much variation costs in the penalty, beside size.
        num_restarts: Random starts.
        max_iterations: Of each start, at most.
        tolerance: A start ends once no derivative of the objective is larger.
        random_state: Of the starts.

    Attributes:
        classes_: The labels, sorted.
        model_: The fitted [`~leviathan.KhronosForClassification`].
        fit_result_: Its [`~leviathan.khronos.KhronosClassificationFit`].
        n_features_in_: Number of inputs.
    """

    def __init__(
        self,
        rank: int = KhronosConfig.rank,
        num_cells: int = KhronosConfig.num_cells,
        degree: int = KhronosConfig.degree,
        *,
        margin: float = 0.0,
        extrapolate: Literal["raise", "linear"] = "linear",
        ridge: float = CLASSIFICATION_DEFAULTS["ridge"],
        smoothness: float = CLASSIFICATION_DEFAULTS["smoothness"],
        num_restarts: int = CLASSIFICATION_DEFAULTS["num_restarts"],
        max_iterations: int = CLASSIFICATION_DEFAULTS["max_iterations"],
        tolerance: float = CLASSIFICATION_DEFAULTS["tolerance"],
        random_state: int | np.random.RandomState | None = None,
    ):
        self.rank = rank
        self.num_cells = num_cells
        self.degree = degree
        self.margin = margin
        self.extrapolate = extrapolate
        self.ridge = ridge
        self.smoothness = smoothness
        self.num_restarts = num_restarts
        self.max_iterations = max_iterations
        self.tolerance = tolerance
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> KhronosClassifier:
        """Fits to X (samples, features) and labels y (samples,) of any type.

        Samples of weight 0 are left out, also of the box.

        Raises:
            ValueError: If a value is not finite, a shape does not fit, or there is but one class.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        classes, labels = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y holds the one class {classes[0]!r}; expected at least two classes.")
        data = training_data(X, labels, sample_weight)
        sizes = _whole(self, "rank", "num_cells", "degree")
        config = KhronosConfig.for_data(
            data.x, margin=self.margin, extrapolate=self.extrapolate, num_labels=len(classes), **sizes
        )
        model = KhronosForClassification(config).double()
        self.fit_result_ = model.fit(
            data.x,
            data.y[:, 0],
            sample_weight=data.weight,
            ridge=self.ridge,
            smoothness=self.smoothness,
            **_whole(self, "num_restarts", "max_iterations"),
            tolerance=self.tolerance,
            seed=_seed(self.random_state),
        )
        self.model_, self.classes_ = model, classes
        return self

    def predict(self, X: ArrayLike) -> NDArray:
        """The most probable label of each row of X. Raises as :meth:`predict_proba`."""
        check_is_fitted(self)
        return self.classes_[self.predict_proba(X).argmax(-1)]

    def predict_proba(self, X: ArrayLike) -> NDArray:
        """Probabilities (samples, classes), in the order of ``classes_``.

        Raises:
            ValueError: If a value is not finite, or outside the box while ``extrapolate="raise"``, or the number of
                features differs.
        """
        check_is_fitted(self)
        return np.asarray(self.model_.predict_proba(validate_data(self, X, dtype=np.float64, reset=False)))


def _whole(estimator: BaseEstimator, *names: str) -> dict[str, Any]:
    """The estimator's settings of these names, of which searches may make numpy's integers, as Python's."""
    settings = {}
    for name in names:
        try:
            settings[name] = operator.index(getattr(estimator, name))
        except TypeError as error:
            raise ValueError(f"{name} = {getattr(estimator, name)!r}; expected an integer.") from error
    return settings


def _seed(random_state: int | np.random.RandomState | None) -> int:
    return int(check_random_state(random_state).randint(2**31 - 1))


__all__ = ["KhronosClassifier", "KhronosRegressor"]
