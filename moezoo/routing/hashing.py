"""Hash functions from tokens to experts: tables that are drawn or computed once, then fixed.

Roller et al. 2021, arXiv:2106.04426, section 3. All are computed on the CPU from a generator of
their own, so that they are the same in every process and whatever else was drawn.

Shapes: V size of the vocabulary, E experts, R hash functions, D width of embeddings.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import torch
from torch import Tensor

from moezoo.calls import check_context
from moezoo.errors import InputError


def random_experts(rows: int, columns: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """Draw experts uniformly and independently: ``(rows, columns)`` int64."""
    return torch.randint(num_experts, (rows, columns), generator=generator)


def different_experts(
    rows: int, columns: int, num_experts: int, generator: torch.Generator
) -> Tensor:
    """Draw experts uniformly, those of a column all different: ``(rows, columns)`` int64."""
    drawn = torch.empty(rows, columns, dtype=torch.int64)
    for row in range(rows):
        # One of those that are left; passing each that is taken, the least first, finds it.
        expert = torch.randint(num_experts - row, (columns,), generator=generator)
        for taken in drawn[:row].sort(dim=0).values:
            expert += expert >= taken
        drawn[row] = expert
    return drawn


def balanced_table(
    frequencies: Tensor, num_experts: int, generator: torch.Generator | None = None
) -> Tensor:
    """Even out the experts' load: each token, most frequent first, goes to the least loaded.

    An expert's load exceeds the mean by at most the frequency of its last token, unless one token
    alone does. Tokens that never occur carry no load and are dealt out evenly.

    Args:
        frequencies: ``(V,)``, how often each token occurs; counts or probabilities.
        num_experts: number of experts E.
        generator: shuffles tokens among their E neighbours in frequency, for further hash
            functions that are balanced but group tokens otherwise.

    Returns:
        ``(V,)`` int64.

    Raises:
        InputError: frequencies are negative, not finite, or all zero.
    """
    counts = frequencies.detach().double().cpu()
    if counts.ndim != 1 or not (counts.isfinite() & (counts >= 0)).all() or not counts.any():
        raise InputError("frequencies: give one number ≥ 0 per token, not all zero")
    order = counts.argsort(descending=True, stable=True)
    if generator is not None:
        blocks = order.split(num_experts)
        order = torch.cat([b[torch.randperm(len(b), generator=generator)] for b in blocks])
    amounts = counts[order].tolist()
    room = [(0.0, expert) for expert in range(num_experts)]
    chosen = []
    unseen = 0
    for amount in amounts:
        if amount:
            load, expert = heapq.heappop(room)
            heapq.heappush(room, (load + amount, expert))
        else:
            expert = unseen % num_experts
            unseen += 1
        chosen.append(expert)
    return torch.empty_like(order).scatter(0, order, torch.tensor(chosen))


def clustered_table(embeddings: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """Send similar tokens to the same expert: k-means with E clusters of ``(V, D)`` embeddings."""
    return k_means(embeddings, num_experts, generator)


def dispersed_table(
    embeddings: Tensor,
    num_experts: int,
    generator: torch.Generator,
    num_clusters: int | None = None,
) -> Tensor:
    """Send similar tokens to different experts: deal the members of each cluster out in turn.

    Args:
        embeddings: ``(V, D)``.
        num_experts: number of experts E.
        generator: source of k-means' starting points.
        num_clusters: number of clusters; default E.

    Returns:
        ``(V,)`` int64. Experts differ by at most one token, in each cluster and altogether.
    """
    cluster_V = k_means(embeddings, num_clusters or num_experts, generator)
    order = cluster_V.argsort(stable=True)
    dealt = torch.arange(len(order)) % num_experts
    return torch.empty_like(order).scatter(0, order, dealt)


def k_means(
    points: Tensor, num_clusters: int, generator: torch.Generator, iterations: int = 50
) -> Tensor:
    """Cluster points by Lloyd's algorithm from k-means++ starts: ``(V,)`` int64.

    A cluster that loses all its points starts again at the point farthest from its centre.

    Raises:
        InputError: not a matrix, not finite, or fewer points than clusters.
    """
    x_VD = points.detach().to(device="cpu", dtype=torch.float32)
    if x_VD.ndim != 2 or not x_VD.isfinite().all():
        raise InputError("embeddings: give a finite matrix with one row per token")
    if len(x_VD) < num_clusters:
        raise InputError(
            f"embeddings: {len(x_VD)} tokens do not make {num_clusters} clusters; give as many "
            "tokens, or fewer experts"
        )
    centres_KD = _spread_starts(x_VD, num_clusters, generator)
    cluster_V = torch.full((len(x_VD),), -1)
    for _ in range(iterations):
        distance_V, nearest_V = _nearest(x_VD, centres_KD)
        if torch.equal(nearest_V, cluster_V):
            break
        cluster_V = nearest_V
        sizes_K = torch.bincount(cluster_V, minlength=num_clusters)
        sums_KD = torch.zeros_like(centres_KD).index_add_(0, cluster_V, x_VD)
        centres_KD = sums_KD / sizes_K.clamp(min=1).unsqueeze(-1)
        empty = (sizes_K == 0).nonzero().flatten()
        centres_KD[empty] = x_VD[distance_V.topk(len(empty)).indices]
    return cluster_V


def _spread_starts(x_VD: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Choose starts far from each other: each with probability as its squared distance."""
    first = int(torch.randint(len(x_VD), (1,), generator=generator))
    chosen = [first]
    distance_V = (x_VD - x_VD[first]).square().sum(dim=-1)
    for _ in range(num_clusters - 1):
        # The first point whose cumulated distance passes a random level.
        total_V = distance_V.double().cumsum(dim=0)
        level = torch.rand(1, generator=generator, dtype=torch.float64) * total_V[-1]
        following = min(int(torch.searchsorted(total_V, level, right=True)), len(x_VD) - 1)
        chosen.append(following)
        distance_V = torch.minimum(distance_V, (x_VD - x_VD[following]).square().sum(dim=-1))
    return x_VD[chosen].clone()


def _nearest(x_VD: Tensor, centres_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Return each point's squared distance to its nearest centre, and that centre's number."""
    found = []
    for part_PD in x_VD.split(8192):
        scores_PK = centres_KD.square().sum(dim=-1) - 2 * part_PD @ centres_KD.t()
        best = scores_PK.min(dim=-1)
        distance_P = best.values + part_PD.square().sum(dim=-1)
        found.append((distance_P.clamp(min=0), best.indices))
    return torch.cat([d for d, _ in found]), torch.cat([n for _, n in found])


def aligned(
    hidden: Tensor,
    token_ids: Tensor | None,
    mask: Tensor | None,
    vocab_size: int,
    layer: str = "HashLayer",
) -> tuple[Tensor, Tensor | None]:
    """Return token ids and mask, checked and of the same length ``(..., L)``.

    Args:
        hidden: ``(..., S, d_model)``.
        token_ids: ``(..., L)`` int64 or int32 with L >= S, the last S of which are ``hidden``'s.
        mask: ``(..., S)`` or ``(..., L)`` bool; earlier tokens that it leaves out are real.
        vocab_size: V; ids on the CPU are checked to be below it.
        layer: what messages call the layer.

    Raises:
        InputError: token ids are missing or outside the vocabulary, or a shape does not match.
    """
    if token_ids is None:
        raise InputError(f"token_ids: missing; {layer} routes on them, so pass token_ids")
    check_context(hidden, token_ids, mask=mask)
    if hidden.ndim == 1:
        hidden = hidden[None]
        token_ids = token_ids.reshape(-1)
        mask = None if mask is None else mask.reshape(-1)
    ahead = token_ids.shape[-1] - hidden.shape[-2] if token_ids.ndim else -1
    if token_ids.shape[:-1] != hidden.shape[:-2] or ahead < 0:
        raise InputError(
            f"token_ids: shape {tuple(token_ids.shape)} does not match hidden's "
            f"{tuple(hidden.shape[:-1])}"
        )
    if token_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_ids(token_ids, vocab_size)
    if mask is None:
        return token_ids, None
    if mask.shape == hidden.shape[:-1] and ahead:
        mask = torch.cat([mask.new_ones(*mask.shape[:-1], ahead), mask], dim=-1)
    if mask.shape != token_ids.shape:
        raise InputError(
            f"mask: shape {tuple(mask.shape)} does not match hidden's {tuple(hidden.shape[:-1])}"
        )
    return token_ids, mask


def addressed(
    hidden: Tensor,
    token_ids: Tensor | None,
    mask: Tensor | None,
    vocab_size: int,
    address: Callable[[Tensor, Tensor | None, int], Tensor],
    layer: str = "HashLayer",
) -> tuple[Tensor, Tensor | None]:
    """Return what each token is addressed to, ``(T, C)``, and the mask of these tokens ``(T,)``.

    Args:
        hidden: as of :func:`aligned`, as all that is not named here.
        token_ids: as there.
        mask: as there.
        vocab_size: as there.
        address: given token ids and mask ``(..., L)`` and the number S of the last that are
            ``hidden``'s, it returns these tokens' numbers, ``(T, C)``.
        layer: as there.

    Raises:
        InputError: as :func:`aligned`.
    """
    token_ids, mask = aligned(hidden, token_ids, mask, vocab_size, layer)
    length = hidden.shape[-2] if hidden.ndim > 1 else 1
    found_TC = address(token_ids, mask, length)
    return found_TC, None if mask is None else mask[..., mask.shape[-1] - length :].reshape(-1)


def _check_ids(token_ids: Tensor, vocab_size: int) -> None:
    if not token_ids.numel():
        return
    low, high = (int(bound) for bound in token_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"token_ids: id {low if low < 0 else high} is outside the table of "
            f"{vocab_size}; set vocab_size to the tokenizer's"
        )


def shifted(token_ids: Tensor, mask: Tensor | None, offset: int, missing: int) -> Tensor:
    """Return the token ``offset`` places later (earlier if negative), of each place in a sequence.

    Args:
        token_ids: ``(..., S)`` int64.
        mask: ``(..., S)`` bool, true at real tokens.
        offset: 1 for the next token, -1 for the previous one.
        missing: what stands where there is no such token, or padding.
    """
    if mask is not None:
        token_ids = token_ids.masked_fill(~mask, missing)
    length = token_ids.shape[-1]
    nothing = token_ids.new_full((*token_ids.shape[:-1], abs(offset)), missing)
    if offset < 0:
        return torch.cat([nothing, token_ids], dim=-1)[..., :length]
    return torch.cat([token_ids, nothing], dim=-1)[..., -length:] if length else token_ids


def chosen(
    key: str, table: Tensor, num_experts: int, token_ids: Tensor, mask: Tensor | None
) -> Tensor:
    """Return the experts of each place in a sequence, ``(..., L, C)`` int64.

    Args:
        key: what is hashed, see :class:`moezoo.HashLayer`.
        table: ``(C, V + 1)`` experts, for bigrams ``(2 C, V + 1)``; of positions there is none.
        num_experts: number of experts E.
        token_ids: ``(..., L)`` int64.
        mask: ``(..., L)`` bool, true at real tokens.
    """
    missing = table.shape[1] - 1
    if key == "position":
        return positions(token_ids, mask).unsqueeze(-1) % num_experts
    if key == "bigram":
        # Tabulation hashing: the sum of independent tables is a random function of the pair.
        previous = shifted(token_ids, mask, -1, missing)
        of_previous, of_token = table.chunk(2)
        return (of_previous.t()[previous] + of_token.t()[token_ids]) % num_experts
    offset = {"token": 0, "previous": -1, "future": 1}[key]
    if offset:
        token_ids = shifted(token_ids, mask, offset, missing)
    return table.t()[token_ids]


def keys(key: str, token_ids: Tensor, mask: Tensor | None, missing: int) -> Tensor:
    """Return what each place in a sequence is hashed by, ``(..., L, 1)``, of bigrams ``(..., 2)``.

    Args:
        key: as of :func:`chosen`.
        token_ids: ``(..., L)`` int64.
        mask: ``(..., L)`` bool, true at real tokens.
        missing: what stands where there is no such token.
    """
    if key == "position":
        return positions(token_ids, mask).unsqueeze(-1)
    if key == "bigram":
        return torch.stack([shifted(token_ids, mask, -1, missing), token_ids], dim=-1)
    offset = {"token": 0, "previous": -1, "future": 1}[key]
    found = shifted(token_ids, mask, offset, missing) if offset else token_ids
    return found.unsqueeze(-1)


def positions(token_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Count each sequence's real tokens from zero; ``(..., S)`` int64."""
    real = torch.ones_like(token_ids) if mask is None else mask.to(torch.int64)
    return (real.cumsum(dim=-1) - 1).clamp(min=0)


def built_tables(
    kind: str,
    source: Tensor,
    num_hashes: int,
    num_experts: int,
    generator: torch.Generator,
    num_clusters: int | None = None,
) -> Tensor:
    """Return a table per hash function, ``(num_hashes, V)``, each of another random state.

    Args:
        kind: balanced, clustered or dispersed.
        source: ``(V,)``, how often each token occurs, for balanced; ``(V, any)``, embeddings, for
            the others.
        num_hashes: number of tables.
        num_experts: tokens are routed to so many experts.
        generator: of what is random; the first balanced table is not.
        num_clusters: for dispersed; default num_experts.
    """
    rows = []
    for number in range(num_hashes):
        if kind == "balanced":
            rows.append(balanced_table(source, num_experts, generator if number else None))
        elif kind == "clustered":
            rows.append(clustered_table(source, num_experts, generator))
        else:
            rows.append(dispersed_table(source, num_experts, generator, num_clusters))
    return torch.stack(rows)
