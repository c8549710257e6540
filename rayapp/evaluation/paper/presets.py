"""The two lists of rows: one size side by side, and a whole paper over many sizes.

``tables`` sets dense, the peers and ours side by side at one size. Peers know one removal set for
both stages there, so theirs is shared, and as large as the mean of the two stages' sizes.

``paper`` compares methods over sizes of prefill, of decode, and of both. Sizes are those of a model
of 30 blocks, carried to other depths by their share. Peers' methods search the same spaces as ours,
stage by stage; only PDTrim keeps its rule, by which prefill removes a subset of what decode does.
POP's rule needs no search: the last blocks, with the first answer token from decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from rayapp.evaluation.paper.rows import DENSE, Row
from rayapp.evaluation.paper.settings import Preset
from rayapp.plan import STAGES, Encoding, KVTransfer, ModelSignature, PruningPlan, Stage
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.search.sensitivity import Sensitivity

_SHARED = {"shared": True, "kv_modes": False}
_SUBSET = {"kv_modes": False, "method": "annealing"}
_OURS = {"kv_modes": True}
OURS = "kv_modes"
"""The name of our row under the peers' conditions: no training, all KV sent."""
_PLANS = ("shared", "pdtrim", "kv_modes", "pdtrim_healed", "healed")


def _peer(name: str, title: str, source: str = "") -> Row:
    return Row(name, title, source, {**_SHARED, "method": name}, beside=OURS)


TABLES = (
    DENSE,
    _peer("random", "random"),
    _peer("similarity", "ShortGPT", "arXiv:2403.03853"),
    _peer("window", "cosine window (Gromov)", "arXiv:2403.17887"),
    _peer("one_shot", "Shortened-LLaMA", "arXiv:2402.02834"),
    _peer("greedy", "SLEB", "arXiv:2402.09025"),
    _peer("evolution", "EvoPress", "arXiv:2410.14649"),
    Row("shared", "ours, one shared set", "ours", _SHARED),
    Row("pdtrim", "PDTrim, subset rule", "arXiv:2509.04467", _SUBSET),
    Row("kv_modes", "ours, kv modes", "ours", _OURS),
    Row("pdtrim_healed", "PDTrim, subset rule, healed", "arXiv:2509.04467", _SUBSET, healed=True),
    Row("healed", "ours, kv modes, healed", "ours", _OURS, healed=True),
    Row("kv_selected", "ours, with KV selection", "ours", after=_PLANS),
    Row("unified", "the same, unified", "ours", after=(*_PLANS, "kv_selected")),
)
"""The rows at one size, in the order of the tables."""

OF_BLOCKS = 30
"""Number of blocks that the sizes of the paper are given for."""
PREFILL, DECODE, PAIRS = (2, 4, 6, 8, 10, 12, 15), (1, 2, 3, 4), ((4, 2), (8, 2), (8, 4))
PEERS_PREFILL, PEERS_DECODE, PEERS_PAIRS = (4, 8, 12), (2, 4), ((8, 2),)
"""Sizes at which peers are searched too; a subset of ours."""
FIRST_TOKEN_WEIGHT = 16.0
"""Number of tokens that the first one counts as where it weighs more: completions of calibration
lines are a few times as long (project default)."""
Size = tuple[int, int]
"""Blocks that prefill and decode remove."""
_POP = "arXiv:2602.03295"
_WANDA = "arXiv:2312.11983"
_PEERS = (
    ("similarity", "ShortGPT", "arXiv:2403.03853"),
    ("greedy", "SLEB", "arXiv:2402.09025"),
    ("evolution", "EvoPress", "arXiv:2410.14649"),
    ("cbo", "CBO", "arXiv:2602.00161"),
)


def rows_of(preset: Preset, num_blocks: int) -> tuple[Row, ...]:
    """The rows of a preset for a model of so many blocks, in the order of the tables."""
    return TABLES if preset == "tables" else tuple(_paper(num_blocks))


def _paper(num_blocks: int) -> Iterator[Row]:
    ours = _sizes(num_blocks, PREFILL, DECODE, PAIRS)
    theirs = _sizes(num_blocks, PEERS_PREFILL, PEERS_DECODE, PEERS_PAIRS)
    yield DENSE
    yield from _without_search(ours)
    yield from _searched(ours)
    yield from _peers(theirs)
    for size in theirs:
        yield _sized("healed", "ours, blocks, healed", "ours", size, _OURS, healed=True)
    pairs = tuple(_name("ours", size) for size in ours if all(size))
    yield Row("kv_selected", "ours, with KV selection", "ours", after=pairs)
    for size in (size for size in theirs if not size[1]):
        blocks = "1 block" if size[0] == 1 else f"{size[0]} blocks"
        title = f"MLP channels, parameters of {blocks}, first token from decode"
        yield _sized("channels", title, _WANDA, size, None, "decode", narrows=True)
    for encoding in ("int8", "int4"):
        made = partial(encoded, encoding)
        yield Row(encoding, f"dense with {encoding} KV", "", sizes=(0, 0), made=made)


def _without_search(sizes: list[Size]) -> Iterator[Row]:
    """POP's rule, and the blocks that cost least alone; unhealed, and healed in closed form."""
    of_prefill = [size for size in sizes if not size[1]]
    rows = []
    for size in of_prefill:
        made = partial(last_blocks, *size)
        rows.append(_sized("pop", "POP's rule", _POP, size, None, "decode", made=made))
    rows += [
        _sized("singles", "cheapest blocks alone", "ours", size, None, mapped=True)
        for size in sizes
    ]
    for size in of_prefill:
        title = "cheapest blocks alone, first token from decode"
        rows.append(_sized("late_singles", title, "ours", size, None, "decode", mapped=True))
    yield from rows
    yield from map(_fitted, rows)


def _in_int4(row: Row) -> Row:
    """A row whose plan sends all of its KV as int4."""
    assert row.sizes is not None, "such rows have sizes"
    family = f"{row.family}_int4"
    return Row(
        _name(family, (int(row.sizes[0]), int(row.sizes[1]))),
        f"{row.title}, int4 KV",
        row.source,
        after=(row.name,),
        family=family,
        sizes=row.sizes,
        first_token=row.first_token,
        encoding="int4",
    )


def _fitted(row: Row) -> Row:
    """A row without a search, healed in closed form."""
    assert row.sizes is not None, "such rows have sizes"
    family = f"{row.family}_healed"
    return Row(
        f"{family}-{row.name.partition('-')[2]}",
        f"{row.title}, healed",
        row.source,
        healed=True,
        after=(row.name,),
        family=family,
        sizes=row.sizes,
        first_token=row.first_token,
        fitted=True,
    )


def _searched(sizes: list[Size]) -> Iterator[Row]:
    """Our searches: of blocks, of their parts, and those that mind the first answer token.

    In one family of those it weighs more, and in another decode makes it; plans of the last kind
    are healed in closed form, too, as POP's are.
    """
    for size in sizes:
        yield _sized("ours", "ours, blocks", "ours", size, _OURS)
    for size in sizes:
        yield _sized("parts", "ours, parts", "ours", size, {**_OURS, "unit": "part"})
    for size in (size for size in sizes if size[0]):
        title = f"ours, blocks, first token counts as {FIRST_TOKEN_WEIGHT:g}"
        weight = FIRST_TOKEN_WEIGHT
        yield _sized("first", title, "ours", size, _OURS, first_token_weight=weight)
    title = "ours, first token from decode"
    late = [_sized("late", title, "ours", s, _OURS, "decode") for s in sizes if not s[1]]
    yield from late
    yield from map(_fitted, late)
    yield from map(_in_int4, late)


def _peers(sizes: list[Size]) -> Iterator[Row]:
    for name, title, source in _PEERS:
        for size in sizes:
            yield _sized(name, title, source, size, {**_OURS, "method": name}, beside="ours")
    for name, title, source in _PEERS:
        for size in sizes:
            search = {**_OURS, "method": name}
            yield _sized(f"{name}_healed", f"{title}, healed", source, size, search, healed=True)
    subsets = dict.fromkeys((prefill, max(prefill, decode)) for prefill, decode in sizes)
    for size in subsets:
        yield _sized("pdtrim", "PDTrim, subset rule", "arXiv:2509.04467", size, _SUBSET)


def _sizes(
    num_blocks: int,
    prefill: tuple[int, ...],
    decode: tuple[int, ...],
    pairs: tuple[Size, ...],
) -> list[Size]:
    """Sizes carried to a model's depth, without repetitions; a stage keeps a block at least."""
    wanted = [*((k, 0) for k in prefill), *((0, k) for k in decode), *pairs]
    carried = [tuple(max(min(k, 1), round(k * num_blocks / OF_BLOCKS)) for k in s) for s in wanted]
    kept = [(p, d) for p, d in carried if max(p, d) < num_blocks]
    return list(dict.fromkeys(kept))


def _name(family: str, size: Size) -> str:
    return f"{family}-p{size[0]}-d{size[1]}"


def _sized(
    family: str,
    title: str,
    source: str,
    size: Size,
    search: Mapping[str, Any] | None,
    first_token: Stage = "prefill",
    *,
    beside: str = "",
    **more: Any,
) -> Row:
    return Row(
        _name(family, size),
        title,
        source,
        search,
        family=family,
        sizes=size,
        beside=_name(beside, size) if beside else "",
        first_token=first_token,
        **more,
    )


def last_blocks(prefill: int, decode: int, model: ModelSignature) -> PruningPlan:
    """POP's rule: the last blocks are missed, and the first answer token comes from decode.

    Prefill still writes their KV where decode attends.
    """
    prefill_parts, decode_parts = (
        tuple(range(2 * (model.num_blocks - count), 2 * model.num_blocks))
        for count in (prefill, decode)
    )
    return Candidate(prefill_parts, decode_parts).plan(model, first_token="decode")


def cheapest_blocks(row: Row, model: ModelSignature, maps: Sequence[Sensitivity]) -> PruningPlan:
    """The plan of the blocks whose removal alone costs least, on the mean over calibration sets."""
    singles = [one.singles for one in maps if one.singles]
    assert row.sizes is not None, "a row of the map has sizes"
    assert singles, "the map is measured before such rows"
    parts = []
    for stage, count in zip(STAGES, row.sizes, strict=True):
        costs = [sum(values) for values in zip(*(s.stage(stage) for s in singles), strict=True)]
        order = sorted(range(model.num_blocks), key=lambda block: (costs[block], block))
        chosen = sorted(order[: int(count)])
        parts.append(tuple(part for block in chosen for part in (2 * block, 2 * block + 1)))
    return Candidate(parts[0], parts[1]).plan(model, first_token=row.first_token)


def encoded(
    encoding: Encoding, model: ModelSignature, plan: PruningPlan | None = None
) -> PruningPlan:
    """A plan, or the dense model, with all of its KV in an encoding."""
    plan, rule = plan or PruningPlan(model=model), KVTransfer(encoding=encoding)
    attending = [n for n in range(model.num_blocks) if plan.mode("decode", n).attends]
    return plan.model_copy(update={"kv_transfer": dict.fromkeys(attending, rule)})
