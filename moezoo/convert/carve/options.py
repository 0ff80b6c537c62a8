"""Options of carving: the sizes, and which of the published rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moezoo.errors import InputError, check_choice, check_int, check_number

Split = Literal["contribution", "cmoe", "random", "contiguous", "weight_kmeans", "coactivation"]
RouterKind = Literal["ridge", "ridge_shared", "cmoe", "gate_mean", "prior_approximate"]
SharedBy = Literal["split", "contribution", "elimination", "cmoe"]

SPLITS = ("contribution", "cmoe", "random", "contiguous", "weight_kmeans", "coactivation")
ROUTERS = ("ridge", "ridge_shared", "cmoe", "gate_mean", "prior_approximate")
SHARED_BY = ("split", "contribution", "elimination", "cmoe")


@dataclass(frozen=True)
class CarveOptions:
    """How to cut a dense block into SxAyEz: x always on, y of the z - x others active.

    All z parts have F / z neurons. The defaults are ours; ``split="cmoe", router="cmoe",
    refit=False`` is CMoE as its authors' code computes it (arXiv:2502.04416), and
    ``split="contribution", router="gate_mean", refit=False`` is close to ExpertWeaver
    (arXiv:2602.15521).

    Attributes:
        shared: x, parts that run on every token.
        active: y, routed experts per token.
        experts: z, parts in total.
        split: which neurons go together. ``contribution``: those whose contributions to the output
            rise and fall together. ``cmoe``: those that are among the K_a strongest at the same
            tokens. ``random`` and ``contiguous``: LLaMA-MoE (arXiv:2406.16554) and FactorLLM
            (arXiv:2408.11855). ``weight_kmeans``: those with similar input weights, and
            ``coactivation``: those active together (MoEfication, arXiv:2110.01786).
        shared_by: whose rule picks the shared neurons: that of the ``split``, where ``random`` and
            ``contiguous`` have none and deal them out like the others; ``contribution``'s, those
            whose contribution varies most; ``elimination``: those that the others make up for
            least, the refit included (optimal brain surgeon; ZipLM, arXiv:2302.04089); or
            ``cmoe``'s, those most often among the K_a strongest.
        router: what scores the experts. ``ridge``: a linear map fitted to the size of their
            contributions. ``ridge_shared``: the same of the input and of the absolute activations
            of the shared neurons, which are computed anyway. ``cmoe``: one representative neuron
            each. ``gate_mean``: the mean of their neurons' gate vectors (ExpertWeaver).
            ``prior_approximate``: a linear map trained with FactorLLM's loss.
        refit: fit ``down`` anew, by least squares, to the outputs of the dense block.
        bias: let the refit add an output bias; default: where the dense block has one.
        output_scale: factor on the routed experts' outputs. LLaMA-MoE and FactorLLM take the
            number of routed experts over ``active``.
        top_activations: K_a, how many neurons of a token count as active; default CMoE's 10, and
            a tenth of all for ``coactivation``.
        profile: activations that ``cmoe`` marks and its router computes: those of inputs and
            weights brought to length one (``cosine``, the authors' code), or the block's own
            (``raw``).
        distance: of ``cmoe``'s clusters: ``l1`` (the code), ``l2`` (the paper).
        representative: a cluster's neuron that routes to it: the one next to its ``centroid``
            (published; practically a dead neuron), or the ``most_active`` one.
        signed: leave the sign of ``cmoe``'s scores (eq. 8); the code takes absolute values.
        iterations: of balanced k-means at most; default 8, and the code's 1 for ``cmoe``.
        teacher_share: what ``prior_approximate`` compares an expert's output with, as a share of
            the routed experts' sum; default ``active`` over their number, as in the authors' code.
            Below one half that favours experts of small outputs, and 1 those of the largest.
        features: dimensions that neurons' activities are projected to before clustering.
        router_ridge: regularisation of the ridge router, over the mean of the Gram's diagonal;
            None for the best on the held-out tokens.
        refit_ridge: the same of the refit; where it is chosen, each neuron is penalised over its
            own mean square.
        held_out: share of the calibration tokens, the last, that figures are measured on and
            nothing is fitted to.
        seed: of everything drawn.
    """

    shared: int = 3
    active: int = 3
    experts: int = 8
    split: Split = "contribution"
    shared_by: SharedBy = "split"
    router: RouterKind = "ridge"
    refit: bool = True
    bias: bool | None = None
    output_scale: float = 1.0
    top_activations: int | None = None
    profile: Literal["cosine", "raw"] = "cosine"
    distance: Literal["l1", "l2"] = "l1"
    representative: Literal["centroid", "most_active"] = "centroid"
    signed: bool = False
    iterations: int | None = None
    teacher_share: float | None = None
    features: int = 256
    router_ridge: float | None = 1e-2
    refit_ridge: float | None = 1e-1
    held_out: float = 0.1
    seed: int = 0

    @property
    def routed(self) -> int:
        """Routed experts N = z - x."""
        return self.experts - self.shared

    def check(self, width: int) -> None:
        """Check the options against each other and a block.

        Args:
            width: neurons F of the dense block.

        Raises:
            InputError: an option is out of range, or contradicts another or the width.
        """
        check_int("experts", self.experts, minimum=2)
        check_int("shared", self.shared, minimum=0, maximum=self.experts - 1)
        check_int("active", self.active, maximum=self.routed)
        if width % self.experts:
            raise InputError(
                f"experts: {self.experts} does not divide the block's {width} neurons; "
                f"choose {_divisors(width, self.experts)}"
            )
        check_choice("split", self.split, SPLITS)
        check_choice("shared_by", self.shared_by, SHARED_BY)
        check_choice("router", self.router, ROUTERS)
        check_choice("profile", self.profile, ("cosine", "raw"))
        check_choice("distance", self.distance, ("l1", "l2"))
        check_choice("representative", self.representative, ("centroid", "most_active"))
        check_number("output_scale", self.output_scale)
        if self.top_activations is not None:
            check_int("top_activations", self.top_activations, maximum=width)
        if self.iterations is not None:
            check_int("iterations", self.iterations)
        if self.teacher_share is not None:
            check_number("teacher_share", self.teacher_share)
        check_int("features", self.features)
        check_number("held_out", self.held_out, maximum=0.9)
        for name in ("router_ridge", "refit_ridge"):
            strength = getattr(self, name)
            if strength is not None:
                check_number(name, strength)
            elif not self.held_out:
                raise InputError(
                    f"{name}: is chosen on held-out tokens, and there are none; give a number, or "
                    "held_out"
                )
        if self.router == "ridge_shared" and not self.shared:
            raise InputError(
                "router: ridge_shared reads shared neurons, and there are none; give shared, or "
                "router ridge"
            )
        check_int("seed", self.seed, minimum=0)
        if self.bias and not self.refit:
            raise InputError("bias: comes from the refit; set refit, or leave bias out")


def _divisors(width: int, near: int) -> str:
    """Name the divisors of ``width`` on both sides of ``near``."""
    below = [n for n in range(2, min(near, width)) if width % n == 0]
    above = [n for n in range(near + 1, width + 1) if width % n == 0]
    return " or ".join(str(n) for n in [*below[-1:], *above[:1]])
