"""The losses as modules: arguments in, dictionaries of named losses out.

Arguments, attributes, methods and keys are those of vicreg_loss 1.0.0, including the spelling of ``neirest_neighbores``.
drop_in.py defines the published static methods, and composes a loss of the published methods if one is replaced.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, distributed, drop_in, functional
from .autograd import Weight
from .drop_in import Losses, named, prefixed
from .functional import Options


class _Loss(nn.Module):
    """The arguments that both losses share.  They are read at every call, so that a schedule may change them."""

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
        """A copy that shares only the process group, which cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def _weights(self, losses_of: Tensor | None = None) -> tuple[Weight, Weight, Weight]:
        """The checked coefficients, tensors among them as scalars; ``losses_of``: see :func:`checks.coefficient`."""
        for name in ("inv_coeff", "var_coeff", "cov_coeff"):
            checks.coefficient(name, getattr(self, name), losses_of)
        weights = (self.inv_coeff, self.var_coeff, self.cov_coeff)
        inv, var, cov = (weight.reshape(()) if isinstance(weight, Tensor) else weight for weight in weights)
        return inv, var, cov

    def _options(self) -> Options:
        return Options(self.gamma, self.eps, self.backend, self.precision)

    def _gathers(self) -> bool:
        return self.gather_distributed and distributed.world_size(self.process_group) > 1

    variance_loss = staticmethod(drop_in.variance_loss)
    covariance_loss = staticmethod(drop_in.covariance_loss)

    def extra_repr(self) -> str:
        """The arguments, as the constructor takes them."""
        names = ["inv_coeff", "var_coeff", "cov_coeff", "gamma", "eps"]
        if isinstance(self, VICRegLLoss):
            names = ["num_matches", "alpha", *names, "statistics", "match_order"]
        names += ["gather_distributed", "backend", "precision"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


@drop_in.published
class VICRegLoss(_Loss):
    """VICReg of two batches of embeddings, as vicreg_loss 1.0.0 defines it.

        inv-loss = inv_coeff * mean((x - y)^2)
        var-loss = var_coeff * mean over both views of mean_d relu(gamma - sqrt(v_d + eps))
        cov-loss = cov_coeff * mean over both views of (sum of squared off-diagonal covariances) / D

    Args:
        inv_coeff, var_coeff, cov_coeff: Weights: finite numbers, or tensors with one element, which may be trainable.
        gamma: Standard deviation below which a feature is penalised, in units of the features.
        eps: Added to the variance before the square root, in squared units of the features.
        gather_distributed: Compute the statistics over the batches of all ranks.  The average over ranks that
            DistributedDataParallel forms is then the gradient of one process with the whole batch.
        process_group: The ranks to gather from; None: all ranks.
        backend: "auto", "triton", "aten" or "reference".
        precision: Of matmuls on a GPU: None (torch's setting), "highest", "high" or "medium".

    Source: arXiv:2105.04906.

    >>> loss = VICRegLoss()
    >>> losses = loss(torch.randn(128, 32), torch.randn(128, 32))
    >>> sorted(losses)
    ['cov-loss', 'inv-loss', 'loss', 'var-loss']
    """

    _argument_names = ("x", "y")  # in error messages

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
        """Weighted losses of embeddings x and y, (N, D) each.  Row n of x and row n of y belong to the same sample.

        Returns:
            ``inv-loss``, ``var-loss``, ``cov-loss`` and their sum ``loss``: scalars in float32, or in float64 if an
            input is float64.  Each is differentiable by itself and has its own storage.

        Raises:
            ValueError, TypeError: naming the argument, what it got and what it needs.
        """
        views = dict(zip(self._argument_names, (x, y), strict=True))
        if self._gathers():
            x, y = self._gathered(views)
        else:
            checks.views(views, ndim=2)
        weights = self._weights(x)
        if drop_in.replaces(self, "representation_loss", "variance_loss", "covariance_loss"):
            return drop_in.composed(self, x, y, self.representation_loss)
        return named(functional.two_view_terms(x, y, weights, self._options()))

    def _gathered(self, views: dict[str, Any]) -> list[Tensor]:
        """The views (N, D) with the rows of all ranks."""
        counts = distributed.exchange_counts(
            lambda: checks.views(views, ndim=2, count_samples=False), views, self.process_group
        )
        checks.samples(self._argument_names[0], sum(counts))
        return [distributed.gather_rows(view, counts, self.process_group) for view in views.values()]

    representation_loss = staticmethod(drop_in.representation_loss)


VICReg = VICRegLoss


@drop_in.published
class VICRegLLoss(_Loss):
    """VICRegL: VICReg of global embeddings and of matched patches of two views.

        loss = alpha * global + (1 - alpha) * (feature + location) / 2

    Patches are matched by location and by feature, in both directions.  Each match set gives the three terms of
    VICReg.  They are averaged over the two directions.

    Args:
        num_matches: Number of matched patches of each image; those nearest to their match are kept.  An integer; or a
            pair of integers, for the first view's patches and for the second's; or None: all patches.
        alpha: Share of the global part, in [0, 1].  At 0 the global part is neither needed nor returned, at 1 the
            local part.
        inv_coeff, var_coeff, cov_coeff, gamma, eps: As in :class:`VICRegLoss`.  The constructor's arguments hold for
            both parts.  The attributes hold for the local part; ``global_vicreg_loss`` has those of the global part.
        statistics: What the samples are.  "image": the matched patches of one image; "slot": the k-th matches of all
            images.
        match_order: "distance": nearest match first; "patch": in the order of the patches.
        gather_distributed, process_group, backend, precision: As in :class:`VICRegLoss`.

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
        self.global_vicreg_loss._argument_names = ("x1_glob", "x2_glob")

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
            x1_locations, x2_locations: Coordinates of each patch in the original image, (B, P1, 2), (B, P2, 2), or
                (B, P1, 3), (B, P2, 3) for volumes.  Both in the same unit, of any size.  Not used at alpha = 1.

        Returns:
            ``loss``; and ``global/…``, ``location/…`` and ``feature/…``, each with ``inv-loss``, ``var-loss``,
            ``cov-loss`` and ``loss``.  Types and storage as in :meth:`VICRegLoss.forward`.

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
            inputs = (x1_maps, x2_maps, x1_locations, x2_locations)
            if drop_in.replaces(self, "local_loss"):
                local = self.local_loss(*inputs)
                total = local["feature/loss"] + local["location/loss"]
            else:
                local, total = self._local(*inputs)
            losses.update(local)
            parts.append((1 - alpha) / 2 * total)
        return {"loss": parts[0] if len(parts) == 1 else parts[0] + parts[1], **losses}

    def global_loss(self, x1_glob: Tensor | None, x2_glob: Tensor | None) -> Losses:
        """VICReg of the global embeddings, (B, D) each: ``global/…``."""
        return prefixed("global", self.global_vicreg_loss(x1_glob, x2_glob))

    def local_loss(
        self,
        x1_maps: Tensor | None,
        x2_maps: Tensor | None,
        x1_locations: Tensor | None,
        x2_locations: Tensor | None,
    ) -> Losses:
        """VICReg of the matched patches: ``location/…`` and ``feature/…``, each the mean over both directions."""
        return self._local(x1_maps, x2_maps, x1_locations, x2_locations)[0]

    def _local(
        self,
        x1_maps: Tensor | None,
        x2_maps: Tensor | None,
        x1_locations: Tensor | None,
        x2_locations: Tensor | None,
    ) -> tuple[Losses, Tensor]:
        """The local losses, and the sum of ``location/loss`` and ``feature/loss``."""
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
        if drop_in.replaces(
            self, "local_vicreg_loss", "neirest_neighbores", "variance_loss", "covariance_loss"
        ):
            losses = drop_in.composed_local(self, (x1, x2), (l1, l2), counts)
            total = losses["location/loss"] + losses["feature/loss"]
        else:
            location, feature, total = functional.local_terms(
                (x1, x2), (l1, l2), counts, weights, statistics, match_order, self._options()
            )
            losses = prefixed("location", named(location)) | prefixed("feature", named(feature))
        if images and statistics == "image":
            # Statistics do not cross images, so ranks share only the mean over images.
            values = distributed.average_over_samples(
                torch.stack([*losses.values(), total]), images, self.process_group
            )
            *averages, total = (value.clone() for value in values.unbind())
            losses = dict(zip(losses, averages, strict=True))
        return losses, total

    def _gathered(
        self,
        maps: dict[str, Any],
        locations: dict[str, Any],
        num_matches: tuple[int, int] | None,
        statistics: str,
    ) -> tuple[list[int], dict[str, Any], dict[str, Any]]:
        """Number of images on every rank, maps, and locations.  Per-slot statistics need the images of all ranks."""
        per_slot = statistics == "slot"
        counts = distributed.exchange_counts(
            lambda: checks.local_inputs(maps, locations, num_matches, statistics),
            {**maps, **locations} if per_slot else maps,
            self.process_group,
        )
        if not per_slot:
            return counts, maps, locations

        def gather(tensors: dict[str, Any]) -> dict[str, Any]:
            return {
                name: distributed.gather_rows(tensor, counts, self.process_group)
                for name, tensor in tensors.items()
            }

        return counts, gather(maps), gather(locations)

    def local_vicreg_loss(self, x: Tensor, y: Tensor) -> Losses:
        """VICReg of matched patches x and y, (B, m, C) each; ``statistics`` decides what the samples are."""
        checks.views({"x": x, "y": y}, ndim=3, count_samples=self.statistics == "image")
        if self.statistics == "slot":
            x, y = x.transpose(0, 1), y.transpose(0, 1)
            checks.samples("x", x.shape[1])
        if drop_in.replaces(self, "variance_loss", "covariance_loss"):
            return drop_in.composed(self, x, y, drop_in.mean_squared_difference)
        return named(functional.two_view_terms(x, y, self._weights(), self._options()))

    neirest_neighbores = staticmethod(drop_in.neirest_neighbores)
