"""The losses as modules: arguments in, dictionaries of named losses out.

Their arguments, attributes, methods and keys are those of vicreg_loss 1.0.0, including the spelling of
``neirest_neighbores``.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, checks, distributed, functional
from .autograd import Weight, WeightedTerms, weigh
from .functional import Options
from .reference import VICRegTerms

Losses = dict[str, Tensor]


def _named(terms: WeightedTerms) -> Losses:
    return {"inv-loss": terms.inv, "var-loss": terms.var, "cov-loss": terms.cov, "loss": terms.total}


def _prefixed(prefix: str, losses: Losses) -> Losses:
    return {f"{prefix}/{name}": loss for name, loss in losses.items()}


def _invariance(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference, in float32 at least."""
    return nn.functional.mse_loss(*functional.accumulated(x, y))


class _Loss(nn.Module):
    """The arguments that both losses share, read anew at every call so that schedules may change them."""

    inv_coeff: Weight
    var_coeff: Weight
    cov_coeff: Weight

    def __init__(
        self,
        inv_coeff: Weight,
        var_coeff: Weight,
        cov_coeff: Weight,
        gamma: float,
        eps: float,
        gather_distributed: bool,
        process_group: Any,
        backend: str,
        precision: str | None,
    ) -> None:
        super().__init__()
        self.inv_coeff = inv_coeff
        self.var_coeff = var_coeff
        self.cov_coeff = cov_coeff
        self.gamma = gamma
        self.eps = eps
        self.gather_distributed = gather_distributed
        self.process_group = process_group
        self.backend = backend
        self.precision = precision
        self._weights()
        self._options().checked()
        checks.flag("gather_distributed", gather_distributed)
        distributed.check_group(process_group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Loss":
        """A copy for a teacher or a snapshot: of its own but for the process group, which cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def _weights(self, losses_of: Tensor | None = None) -> tuple[Weight, Weight, Weight]:
        for name in ("inv_coeff", "var_coeff", "cov_coeff"):
            checks.coefficient(name, getattr(self, name), losses_of)
        weights = (self.inv_coeff, self.var_coeff, self.cov_coeff)
        inv, var, cov = (w.reshape(()) if isinstance(w, Tensor) else w for w in weights)
        return inv, var, cov

    def _options(self) -> Options:
        return Options(self.gamma, self.eps, self.backend, self.precision)

    def _gathers(self) -> bool:
        return self.gather_distributed and distributed.world_size(self.process_group) > 1

    def _overrides(self, *names: str) -> bool:
        """Whether a subclass, the instance or a patch replaces one of the published methods: then it is called."""
        published = _PUBLISHED[VICRegLoss if isinstance(self, VICRegLoss) else VICRegLLoss]
        return any(name in self.__dict__ or getattr(type(self), name) is not published[name] for name in names)

    def _composed(self, x: Tensor, y: Tensor, invariance: Any) -> Losses:
        """The terms one by one through the published methods, for those who override them."""
        options = self._options()
        backends.choose(options.backend, x.device)  # refused even where nothing is left for it to do
        variance: Any = self.variance_loss
        covariance: Any = self.covariance_loss
        # The published methods are static: they know nothing of this loss's eps, backend and precision.
        if not self._overrides("variance_loss"):

            def variance(z: Tensor, gamma: float) -> Tensor:
                return functional.one_view_terms(z, options, covariance=False)[0]

        if not self._overrides("covariance_loss"):

            def covariance(z: Tensor) -> Tensor:
                return functional.one_view_terms(z, options)[1]

        inv = invariance(x, y)
        var = (variance(x, self.gamma) + variance(y, self.gamma)) / 2
        cov = (covariance(x) + covariance(y)) / 2
        terms = (
            torch.as_tensor(term, device=x.device) for term in (inv, var, cov)
        )  # overrides may return numbers
        return _named(weigh(VICRegTerms(*terms), self._weights(x)))

    @staticmethod
    def variance_loss(x: Tensor, gamma: float) -> Tensor:
        """Unweighted variance term of one view (..., N, D), with eps = 0: a scalar."""
        checks.views({"x": x})
        return functional.one_view_terms(x, Options(gamma), covariance=False)[0]

    @staticmethod
    def covariance_loss(x: Tensor) -> Tensor:
        """Unweighted covariance term of one view (..., N, D): a scalar."""
        checks.views({"x": x})
        return functional.one_view_terms(x, Options())[1]

    def extra_repr(self) -> str:
        """The arguments, as the constructor takes them."""
        names = ["inv_coeff", "var_coeff", "cov_coeff", "gamma", "eps"]
        if isinstance(self, VICRegLLoss):
            names = ["num_matches", "alpha", *names, "statistics", "match_order"]
        names += ["gather_distributed", "backend", "precision"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class VICRegLoss(_Loss):
    """VICReg of two batches of embeddings, as vicreg_loss 1.0.0 defines it.

        inv-loss = inv_coeff * mean((x - y)^2)
        var-loss = var_coeff * mean over both views of mean_d relu(gamma - sqrt(v_d + eps))
        cov-loss = cov_coeff * mean over both views of the squared off-diagonal covariances' sum / D

    Args:
        inv_coeff, var_coeff, cov_coeff: Weights: finite numbers, or tensors with one element (trainable ones too).
        gamma: Standard deviation below which a feature is penalised, in units of the features.
        eps: Added to the variance before its root.
        gather_distributed: Take the statistics over the batches of all ranks.  The gradients that
            DistributedDataParallel averages are then those of one process with the whole batch.
        process_group: The ranks to gather from; None: all.
        backend: "auto", "triton", "aten" or "reference".
        precision: None (torch's setting), "highest", "high" or "medium": of products on a GPU.

    Source: arXiv:2105.04906.

    >>> loss = VICRegLoss()
    >>> losses = loss(torch.randn(128, 32), torch.randn(128, 32))
    >>> sorted(losses)
    ['cov-loss', 'inv-loss', 'loss', 'var-loss']
    """

    _names = ("x", "y")  # of the arguments, in errors

    def __init__(
        self,
        inv_coeff: Weight = 25.0,
        var_coeff: Weight = 15.0,
        cov_coeff: Weight = 1.0,
        gamma: float = 1.0,
        *,
        eps: float = 0.0,
        gather_distributed: bool = False,
        process_group: Any = None,
        backend: str = "auto",
        precision: str | None = None,
    ) -> None:
        super().__init__(
            inv_coeff, var_coeff, cov_coeff, gamma, eps, gather_distributed, process_group, backend, precision
        )

    def forward(self, x: Tensor, y: Tensor) -> Losses:
        """Weighted losses of embeddings x and y, (N, D) each, row n of both of the same sample.

        Returns:
            ``inv-loss``, ``var-loss``, ``cov-loss`` and their sum ``loss``: scalars in float32 (float64 if an
            input is), each differentiable by itself and with storage of its own.

        Raises:
            ValueError, TypeError: naming the argument, what it got and what it needs.
        """
        views = dict(zip(self._names, (x, y), strict=True))
        if self._gathers():
            x, y = self._gathered(views)
        else:
            checks.views(views, ndim=2)
        weights = self._weights(x)
        if self._overrides("representation_loss", "variance_loss", "covariance_loss"):
            return self._composed(x, y, self.representation_loss)
        return _named(functional.two_view_terms(x, y, weights, self._options()))

    def _gathered(self, views: dict[str, Any]) -> list[Tensor]:
        error: Exception | None = None
        try:
            checks.views(views, ndim=2, count_samples=False)
        except (TypeError, ValueError) as found:
            error = found
        counts = distributed.exchange_counts(views, error, self.process_group)
        checks.samples(self._names[0], sum(counts))
        return [distributed.gather_rows(view, counts, self.process_group) for view in views.values()]

    @staticmethod
    def representation_loss(x: Tensor, y: Tensor) -> Tensor:
        """Unweighted invariance term of two views of one shape: a scalar."""
        checks.views({"x": x, "y": y}, count_samples=False)
        return _invariance(x, y)


VICReg = VICRegLoss


class VICRegLLoss(_Loss):
    """VICRegL: VICReg of global embeddings and of matched patches of two views.

        loss = alpha * global + (1 - alpha) * (feature + location) / 2

    Patches are matched by location and by feature, in both directions; each match set gives the three terms of
    VICReg, averaged over the two directions.

    Args:
        num_matches: Patches of each image that are matched, those nearest to their match: a whole number; a pair of
            them, of the first view's patches and of the second's; None: all of them.
        alpha: Share of the global part, in [0, 1]; at 0 and 1 the other part is neither needed nor returned.
        inv_coeff, var_coeff, cov_coeff, gamma, eps: As :class:`VICRegLoss`; of both parts at construction, then
            of the local part, the global part's are attributes of ``global_vicreg_loss``.
        statistics: "image": an image's matched patches are the samples; "slot": the images' k-th matches are.
        match_order: "distance": nearest match first; "patch": in the order of the patches.
        gather_distributed, process_group, backend, precision: As :class:`VICRegLoss`.

    Source: arXiv:2210.01571.

    >>> loss = VICRegLLoss(num_matches=4)
    >>> maps, locations = torch.randn(2, 8, 49, 64), torch.rand(2, 8, 49, 2)
    >>> losses = loss(*maps, *torch.randn(2, 8, 64), *locations)
    >>> losses["feature/cov-loss"].shape
    torch.Size([])
    """

    global_vicreg_loss: nn.Module

    def __init__(
        self,
        num_matches: int | tuple[int, int] | None = 10,
        alpha: float = 0.75,
        inv_coeff: Weight = 25.0,
        var_coeff: Weight = 15.0,
        cov_coeff: Weight = 1.0,
        gamma: float = 1.0,
        *,
        eps: float = 0.0,
        statistics: str = "image",
        match_order: str = "distance",
        gather_distributed: bool = False,
        process_group: Any = None,
        backend: str = "auto",
        precision: str | None = None,
    ) -> None:
        super().__init__(
            inv_coeff, var_coeff, cov_coeff, gamma, eps, gather_distributed, process_group, backend, precision
        )
        self.num_matches = num_matches
        self.alpha = alpha
        self.statistics = statistics
        self.match_order = match_order
        checks.alpha(alpha)
        self._matching()
        self.global_vicreg_loss = VICRegLoss(
            inv_coeff,
            var_coeff,
            cov_coeff,
            gamma,
            eps=eps,
            gather_distributed=gather_distributed,
            process_group=process_group,
            backend=backend,
            precision=precision,
        )
        self.global_vicreg_loss._names = ("x1_glob", "x2_glob")

    def _matching(self) -> tuple[tuple[int, int] | None, str, str]:
        checks.one_of("statistics", self.statistics, checks.STATISTICS)
        checks.one_of("match_order", self.match_order, checks.MATCH_ORDERS)
        return checks.num_matches(self.num_matches, self.statistics), self.statistics, self.match_order

    def forward(
        self,
        x1_maps: Tensor | None = None,
        x2_maps: Tensor | None = None,
        x1_glob: Tensor | None = None,
        x2_glob: Tensor | None = None,
        x1_locations: Tensor | None = None,
        x2_locations: Tensor | None = None,
    ) -> Losses:
        """Weighted losses of two views.

        Args:
            x1_maps, x2_maps: Patch embeddings (B, P1, C), (B, P2, C), any strides; not used at alpha = 1.
            x1_glob, x2_glob: Global embeddings (B, D); not used at alpha = 0.
            x1_locations, x2_locations: Where each patch lies in the original image, (B, P1, 2), (B, P2, 2), or
                with 3 coordinates in volumes; any one unit for both; not used at alpha = 1.

        Returns:
            ``loss``; ``global/…``, ``location/…`` and ``feature/…`` with ``inv-loss``, ``var-loss``,
            ``cov-loss`` and ``loss`` each.  Types and storage as :meth:`VICRegLoss.forward`.

        Raises:
            ValueError, TypeError: naming the argument, what it got and what it needs.
        """
        alpha = checks.alpha(self.alpha)
        losses: Losses = {}
        parts = []
        if 0.0 < alpha < 1.0:
            checks.one_device({"x1_maps": x1_maps, "x1_glob": x1_glob})
        if alpha > 0.0:
            losses.update(self.global_loss(x1_glob, x2_glob))
            parts.append(alpha * losses["global/loss"])
        if alpha < 1.0:
            given = (x1_maps, x2_maps, x1_locations, x2_locations)
            if self._overrides("local_loss"):
                local = self.local_loss(*given)
                total = local["feature/loss"] + local["location/loss"]
            else:
                local, total = self._local(*given)
            losses.update(local)
            parts.append((1 - alpha) / 2 * total)
        return {"loss": parts[0] if len(parts) == 1 else parts[0] + parts[1], **losses}

    def global_loss(self, x1_glob: Tensor | None, x2_glob: Tensor | None) -> Losses:
        """VICReg of the global embeddings, (B, D) each: ``global/…``."""
        return _prefixed("global", self.global_vicreg_loss(x1_glob, x2_glob))

    def local_loss(
        self,
        x1_maps: Tensor | None,
        x2_maps: Tensor | None,
        x1_locations: Tensor | None,
        x2_locations: Tensor | None,
    ) -> Losses:
        """VICReg of the matched patches: ``location/…`` and ``feature/…``, means over both directions."""
        return self._local(x1_maps, x2_maps, x1_locations, x2_locations)[0]

    def _local(
        self,
        x1_maps: Tensor | None,
        x2_maps: Tensor | None,
        x1_locations: Tensor | None,
        x2_locations: Tensor | None,
    ) -> tuple[Losses, Tensor]:
        """The local losses, and the sum of both ``loss``."""
        num_matches, statistics, match_order = self._matching()
        maps: dict[str, Any] = {"x1_maps": x1_maps, "x2_maps": x2_maps}
        locations: dict[str, Any] = {"x1_locations": x1_locations, "x2_locations": x2_locations}
        images: list[int] = []
        if self._gathers():
            images, maps, locations = self._gathered(maps, locations, num_matches, statistics)
        counts = checks.local_inputs(maps, locations, num_matches, statistics)
        if statistics == "slot":
            checks.samples("x1_maps", maps["x1_maps"].shape[0])
        x1, x2 = maps.values()
        l1, l2 = locations.values()
        weights = self._weights(x1)
        if self._overrides("local_vicreg_loss", "neirest_neighbores", "variance_loss", "covariance_loss"):
            losses = self._composed_local(x1, x2, l1, l2, counts)
            total = losses["location/loss"] + losses["feature/loss"]
        else:
            location, feature, total = functional.local_terms(
                (x1, x2), (l1, l2), counts, weights, statistics, match_order, self._options()
            )
            losses = _prefixed("location", _named(location)) | _prefixed("feature", _named(feature))
        if images and statistics == "image":
            # An image's statistics are its own: ranks share nothing but the mean over images.
            values = distributed.average_over_samples(
                torch.stack([*losses.values(), total]), images, self.process_group
            )
            *rest, total = (value.clone() for value in values.unbind())
            losses = dict(zip(losses, rest, strict=True))
        return losses, total

    def _gathered(
        self,
        maps: dict[str, Any],
        locations: dict[str, Any],
        num_matches: tuple[int, int] | None,
        statistics: str,
    ) -> tuple[list[int], dict[str, Any], dict[str, Any]]:
        """Number of images on every rank; and all images, where statistics run across them."""
        error: Exception | None = None
        try:
            checks.local_inputs(maps, locations, num_matches, statistics)
        except (TypeError, ValueError) as found:
            error = found
        across = statistics == "slot"
        exchanged = {**maps, **locations} if across else maps
        counts = distributed.exchange_counts(exchanged, error, self.process_group)
        if not across:
            return counts, maps, locations

        def gather(named: dict[str, Any]) -> dict[str, Any]:
            return {n: distributed.gather_rows(t, counts, self.process_group) for n, t in named.items()}

        return counts, gather(maps), gather(locations)

    def _composed_local(
        self, x1: Tensor, x2: Tensor, l1: Tensor, l2: Tensor, counts: tuple[int, int]
    ) -> Losses:
        """The local part through the published methods, for those who override them."""
        losses: Losses = {}
        for name, (a, b) in (("location", functional.as_locations(l1, l2)), ("feature", (x1, x2))):
            there, back = (functional.ordering(*maps, self.backend) for maps in ((a, b), (b, a)))
            first = self.local_vicreg_loss(*self._matched(x1, x2, there, counts[0]))
            second = self.local_vicreg_loss(*self._matched(x2, x1, back, counts[1]))
            losses |= {f"{name}/{key}": (first[key] + second[key]) / 2 for key in first}
        return losses

    def _matched(
        self, queries: Tensor, candidates: Tensor, distances: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Matched rows; an overriding ``neirest_neighbores`` decides their order itself."""
        if self._overrides("neirest_neighbores"):
            return self.neirest_neighbores(queries, candidates, distances, count)
        query, candidate = functional.select_matches(distances, count, self.match_order)
        return functional.rows(queries, query), functional.rows(candidates, candidate)

    def local_vicreg_loss(self, x: Tensor, y: Tensor) -> Losses:
        """VICReg of matched patches x and y, (B, m, C) each, with this loss's statistics."""
        checks.views({"x": x, "y": y}, ndim=3, count_samples=self.statistics == "image")
        if self.statistics == "slot":
            x, y = x.transpose(0, 1), y.transpose(0, 1)
            checks.samples("x", x.shape[1])
        if self._overrides("variance_loss", "covariance_loss"):
            return self._composed(x, y, _invariance)
        return _named(functional.two_view_terms(x, y, self._weights(), self._options()))

    @staticmethod
    def neirest_neighbores(
        input_maps: Tensor, candidate_maps: Tensor, distances: Tensor, num_matches: int
    ) -> tuple[Tensor, Tensor]:
        """Matched rows of two maps, from a matrix of their distances.

        Args:
            input_maps: (B, P1, C).
            candidate_maps: (B, P2, C).
            distances: (B, P1, P2), in any unit: only their order counts.
            num_matches: How many inputs to keep, nearest first.

        Returns:
            The chosen inputs and their candidates, (B, m, C) each, differentiable.
        """
        checks.patches(("input_maps", input_maps), ("candidate_maps", candidate_maps))
        checks.match_count(num_matches)
        checks.enough_patches("input_maps", input_maps, num_matches)
        checks.distance_matrix(distances, input_maps, candidate_maps)
        query, candidate = functional.select_matches(distances, num_matches)
        return functional.rows(input_maps, query), functional.rows(candidate_maps, candidate)


# As they are at import, so that a patched class shows.
_PUBLISHED = {
    loss: {name: getattr(loss, name) for name in dir(loss) if not name.startswith("_")}
    for loss in (VICRegLoss, VICRegLLoss)
}
