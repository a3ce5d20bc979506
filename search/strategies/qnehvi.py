"""Noisy expected hypervolume improvement through BoTorch (Daulton, Balandat and Bakshy 2021, "Parallel Bayesian
Optimization of Multiple Noisy Objectives with Expected Hypervolume Improvement", section 3): a peer, and an extra.

Each metric that counts has a Gaussian process of BoTorch's own, with its defaults, on the encoded choices; the next are
those of many random architectures and the neighbours of the front whose improvement is largest.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from optuna.samplers import BaseSampler
from optuna.study import Study

from mixnas.predictors.encoding import ChoiceEncoding
from mixnas.search.strategies import STRATEGIES, Acceptable, Cheap, Question, Strategy
from mixnas.search.strategies.drawing import BatchSampler, distinct, mutated
from mixnas.search.strategies.history import History
from mixnas.search.strategies.modelling import Wanted
from mixnas.search.study.pareto import non_dominated_minimised
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.settings import Between

_SAMPLES = 64  # of the posterior, that the improvement is the mean of
_ENOUGH = {"ftol": 1e-5}  # of a fit: lengths that do not matter go to infinity, and the rest stands long before
_MARGIN = 0.1  # of an objective's extent, by which the reference lies beyond its worst


@STRATEGIES.register("qnehvi")
@dataclass(frozen=True, kw_only=True, slots=True)
class QNEHVI(Strategy):
    """BoTorch's noisy expected hypervolume improvement; of one objective its expected improvement. An extra.

    Attributes:
        first: Random architectures before anything is modelled.
        candidates: Random architectures that each proposal is chosen from, beside mutants of the front.
    """

    first: Annotated[int, Between(4, 100_000)] = 12
    candidates: Annotated[int, Between(50, 100_000)] = 1000

    def check(self) -> None:
        """See `Strategy`."""
        if importlib.util.find_spec("botorch") is None:
            raise ConfigError(
                "search.strategy: qnehvi needs BoTorch, which is not installed here: pip install 'botorch>=0.14' (or "
                "this package with its extra qnehvi). Strategies that need nothing else: predictor, linas, nsga2."
            )

    def make(self, question: Question, cheap: Cheap | None, acceptable: Acceptable) -> BaseSampler:
        """See `Strategy`.

        Raises:
            ConfigError: BoTorch is not installed.
        """
        self.check()
        return QNEHVISampler(question, cheap, acceptable, self)


class QNEHVISampler(BatchSampler):
    """See the module."""

    def __init__(self, question: Question, cheap: Cheap | None, acceptable: Acceptable, config: QNEHVI) -> None:
        super().__init__(question, acceptable)
        self._config, self._cheap = config, cheap
        names = {} if cheap is None else cheap(question.space.encode_many([]))
        self._beforehand = [c for c in question.constraints if c.metric in names]
        later = [c for c in question.constraints if c.metric not in names and c.comparison != "=="]
        self._objectives = [Wanted.of(objective) for objective in question.objectives]
        self._later = [(Wanted.of(c), c.bound) for c in later]
        wanted = dict.fromkeys([*self._objectives, *(w for w, _ in self._later)])
        self._wanted = list(wanted)
        self._history = History(question.space, list(dict.fromkeys(w.name for w in wanted)))
        variables = question.space.variables
        kinds = [(v.axis, v.option, v.knob) for v in variables]
        self._encoding = ChoiceEncoding([v.values for v in variables], [v.parent >= 0 for v in variables], kinds)
        self._fitted: dict[str, Any] = {}  # parameters of the last models

    def propose(self, study: Study, count: int, rng: np.random.Generator) -> list[Architecture]:
        """See `BatchSampler`."""
        history = self._history
        history.update(study)
        decided = self._space.encode_many(list(self._decided))
        pending = np.concatenate([history.pending, decided])
        known = history.known | {row.tobytes() for row in decided}
        few = len(history.done) < max(4, self._config.first - len(history.failed))
        candidates = self._candidates(known, few, rng)
        if not len(candidates):
            return [self._space.sample(rng)]
        rows = candidates[:count] if few else self._best(candidates, pending, count, rng)
        return [self._space.decode(row) for row in rows]

    def _candidates(self, known: set[bytes], few: bool, rng: np.random.Generator) -> np.ndarray:
        """Encoded architectures that may be proposed, in random order."""
        rows = self._space.sample_many(self._config.candidates, rng)
        done = self._history.done
        if len(done) and not few:
            points = self._points()[:, : len(self._objectives)]
            members = done[non_dominated_minimised(points)]
            parents = members[rng.integers(len(members), size=self._config.candidates // 2)]
            rows = np.concatenate([rows, mutated(self._space, parents, rng)])
        rows = distinct(rows)
        rows = rows[[row.tobytes() not in known for row in rows]]
        if self._cheap is not None and self._beforehand and len(rows):
            metrics = self._cheap(rows)
            keeps = np.ones(len(rows), dtype=bool)
            for constraint in self._beforehand:
                keeps &= constraint.hold(np.asarray(metrics[constraint.metric]))
            rows = rows[keeps]
        kept: np.ndarray = rows[rng.permutation(len(rows))]
        return kept

    def _points(self) -> np.ndarray:
        """What was evaluated, minimised (rows, wanted)."""
        names = self._history.names
        return np.stack([w.sign * self._history.values[:, names.index(w.name)] for w in self._wanted], axis=1)

    def _encoded(self, rows: np.ndarray) -> Any:
        import torch

        x = np.hstack([self._encoding.choices(rows), self._encoding.counts(rows)])
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))

    def _best(self, candidates: np.ndarray, pending: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """Those of encoded architectures whose improvement together is largest."""
        import torch

        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad():
            warnings.simplefilter("ignore")  # of fits that end early, which BoTorch tries again
            torch.random.default_generator.manual_seed(int(rng.integers(2**31)))
            acquisition = self._acquisition(pending, int(rng.integers(2**31)))
            left = self._encoded(candidates).unsqueeze(1)
            chosen: list[int] = []
            for _ in range(min(count, len(candidates))):
                with torch.no_grad():
                    values = torch.cat([acquisition(part) for part in left.split(256)])
                values[chosen] = -torch.inf
                chosen.append(int(values.argmax()))
                waiting = np.concatenate([pending, candidates[chosen]])
                acquisition.set_X_pending(self._encoded(waiting))
        best: np.ndarray = candidates[chosen]
        return best

    def _acquisition(self, pending: np.ndarray, seed: int) -> Any:
        import torch
        from botorch.acquisition.logei import qLogNoisyExpectedImprovement
        from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
        from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
        from botorch.acquisition.objective import GenericMCObjective
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import ModelListGP, SingleTaskGP
        from botorch.sampling.normal import SobolQMCNormalSampler
        from gpytorch.mlls import SumMarginalLogLikelihood

        x, minimised = self._encoded(self._history.done), self._points()
        centre, spread = minimised.mean(axis=0), np.maximum(minimised.std(axis=0), 1e-12)
        y = torch.from_numpy(-(minimised - centre) / spread)  # BoTorch maximises
        # standardised already, so that bounds and the reference are on one scale with the models
        model = ModelListGP(*(SingleTaskGP(x, column.unsqueeze(-1), outcome_transform=None) for column in y.T))
        if self._fitted:  # a fit that starts where the last one ended takes a few steps instead of hundreds
            model.load_state_dict(self._fitted)
        fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model), optimizer_kwargs={"options": _ENOUGH})
        self._fitted = model.state_dict()
        limits = [
            (self._wanted.index(w), -(w.sign * bound - centre[self._wanted.index(w)]) / spread[self._wanted.index(w)])
            for w, bound in self._later
        ]
        objectives = len(self._objectives)
        options: dict[str, Any] = {
            "model": model,
            "X_baseline": x,
            "sampler": SobolQMCNormalSampler(torch.Size([_SAMPLES]), seed=seed),
            "constraints": [_below(i, float(limit)) for i, limit in limits] or None,
            "prune_baseline": True,
            "X_pending": self._encoded(pending) if len(pending) else None,
        }
        if objectives == 1:
            return qLogNoisyExpectedImprovement(objective=GenericMCObjective(_first), **options)
        worst, best = y[:, :objectives].min(dim=0).values, y[:, :objectives].max(dim=0).values
        return qLogNoisyExpectedHypervolumeImprovement(
            ref_point=worst - _MARGIN * (best - worst),
            objective=IdentityMCMultiOutputObjective(outcomes=list(range(objectives))),
            **options,
        )


def _first(samples: Any, X: Any = None) -> Any:
    return samples[..., 0]


def _below(outcome: int, limit: float) -> Callable[[Any], Any]:
    """A constraint as BoTorch has it: kept where it is below 0."""
    return lambda samples: limit - samples[..., outcome]
