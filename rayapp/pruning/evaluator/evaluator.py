"""Scores candidates on one chunk, and reuses every state that an earlier candidate computed.

A state is named by exactly what it depends on, and looked up before it is computed:

- prefill's hidden state that enters block ``b``: the chunk and prefill's skips before ``b``; the
  skips of a survivor also say that it is healed, and for which neighbour, and those of a span's
  last block that it has a bridge;
- the KV of block ``b``: the same names, whether its projections were refit, and the rule whose
  encoding it went through, if any;
- decode's hidden state that enters block ``b``: decode's skips before ``b``, and prefill's skips
  before the last block under ``b`` where decode attended, with the transfer rules of the blocks
  where it did.

So a candidate restarts at its first changed block, siblings share prefixes when they come in order,
and a candidate that changes decode alone reuses the whole prefill. Results never depend on which
states were reused: the same operation runs on the same shapes either way.
Shapes: B = lines, P = prompt tokens, D = tokens that decode runs, C = continuation tokens,
E = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from rayapp.kv.quantize import round_trip
from rayapp.plan import SEND_ALL, KVTransfer, Stage
from rayapp.pruning.candidates.candidate import (
    ATTENTION,
    DENSE,
    SEND_ALL_RULE,
    Candidate,
    KVRule,
    kv_rule,
    transfer_of,
)
from rayapp.pruning.candidates.fits import Fit, FitKind
from rayapp.pruning.candidates.healing import NO_HEALING, PARTS, HealedUnit, Healing, Pair
from rayapp.pruning.evaluator.block_runner import KV, BlockKVSlot, BlockRunner, with_room
from rayapp.pruning.evaluator.calibration import Calibration
from rayapp.pruning.evaluator.handoff import Handoff, handoff
from rayapp.pruning.evaluator.masks import Masks
from rayapp.pruning.evaluator.objective import Reference, reference_of, token_values
from rayapp.pruning.evaluator.state_cache import StateCache, Tensors
from rayapp.pruning.settings.compute import CACHE_BYTES
from rayapp.pruning.settings.objective import Objective

LineSums = tuple[float, ...]
_Key = tuple[object, ...]


@dataclass(frozen=True)
class _Pass:
    """One candidate on one chunk.

    ``held`` keeps the states that the rest of the pass needs, whatever the bound of the cache.

    ``rules`` are the transfer rules of all blocks; a block where decode does not attend has the
    rule that sends all.

    ``fits`` are the linear maps of a healed candidate, by stage, kind and block.
    """

    chunk: int
    inputs: Handoff
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    rules: tuple[KVRule, ...]
    fits: Mapping[tuple[Stage, FitKind, int], Fit] = field(default_factory=dict)
    held: dict[_Key, Tensors] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        cut = any(rule[1:] != SEND_ALL_RULE for rule in self.rules)
        return not any(self.prefill) and not any(self.decode) and not cut

    def refit(self, block: int) -> Fit | None:
        """The projections that write the block's KV in prefill, if they were refit."""
        return self.fits.get(("prefill", "kv", block))


class Evaluator:
    """The compute of a search on one device: it runs the blocks that scores and measures need.

    Args:
        model: The dense model.
        calibration: The chunks that are scored.
        objective: The objective that scores are computed for.
        cache_bytes: Bound of the bytes kept for reuse; with 0 nothing is reused, and scores are the
            same.

    Attributes:
        blocks_run: Blocks run so far, counting blocks of which nothing is left too.
        forwards: Block x token forwards so far, padding included. A part counts one half, and so
            does the KV of a block that is written without its attention.
        masks: Attention masks of both stages' tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: Calibration,
        objective: Objective,
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.calibration = calibration
        self.objective = objective
        self.runner = BlockRunner(model)
        self.blocks_run = 0
        self.forwards = 0.0
        self._cache = StateCache(cache_bytes)
        self._inputs: dict[int, Handoff] = {}
        runner = self.runner
        self.masks = Masks(self.inputs, runner.windows, runner.device, runner.dtype)

    @torch.inference_mode()
    def line_sums(
        self, candidates: Sequence[Candidate], chunk: int, healing: Healing = NO_HEALING
    ) -> list[LineSums]:
        """Sums over every line's continuation tokens in ``chunk``, one row per candidate, float64.

        Candidates may come in any order; ascending order reuses most states. The pairs that they
        use under ``healing`` must have been added before.
        """
        lines = self.calibration.chunks[chunk]
        valid_BC = self.inputs(chunk).valid_BC
        reference = self._reference(chunk) if self.objective.kind == "kl" else None
        sums = []
        for candidate in candidates:
            run = self._pass(candidate, chunk, self.objective.kv_transfer, healing)
            logits_BCV = self._logits(run)
            values_BC = token_values(self.objective, reference, logits_BCV, lines.continuations_BC)
            sums_B = values_BC.cpu().masked_fill(~valid_BC, 0.0).sum(dim=1)
            sums.append(tuple(sums_B.tolist()))
        return sums

    def add_healed(self, healed: HealedUnit) -> None:
        """Make a trained pair known to candidates that use it."""
        self.runner.add_healed(healed)

    @torch.inference_mode()
    def dense_state(self, stage: Stage, chunk: int, block: int) -> torch.Tensor:
        """The dense model's hidden states that enter ``block`` at a stage's positions, ``BTE``."""
        return self.state(DENSE, stage, chunk, block)

    @torch.inference_mode()
    def state(
        self,
        candidate: Candidate,
        stage: Stage,
        chunk: int,
        block: int,
        healing: Healing = NO_HEALING,
    ) -> torch.Tensor:
        """A candidate's hidden states that enter ``block`` at a stage's positions, ``(B, T, E)``.

        Transfer rules are not applied; units of ``healing`` were added before.
        """
        run = self._pass(candidate, chunk, {}, healing)
        if stage == "prefill":
            return self._prefill_state(run, block)
        return self._decode_state(run, block)

    @torch.inference_mode()
    def dense_kv(self, chunk: int, block: int) -> KV:
        """The KV of ``block`` that the dense model's prefill writes, padding included."""
        run = self._pass(DENSE, chunk, {})
        num_entries = run.inputs.prefill_ids_BP.shape[1]
        keys_BHKD, values_BHKD = self._written_kv(run, block)
        return keys_BHKD[:, :, :num_entries], values_BHKD[:, :, :num_entries]

    @torch.inference_mode()
    def attend(
        self,
        candidate: Candidate,
        stage: Stage,
        chunk: int,
        block: int,
        healing: Healing = NO_HEALING,
    ) -> None:
        """Run one block of a stage on the states that enter it, all KV at hand, for observers.

        See :func:`rayapp.models.attention.observed_attention`. Transfer rules are not applied.
        """
        run = self._pass(replace(candidate, kv=()), chunk, {}, healing)
        inputs = run.inputs
        if stage == "prefill":
            hidden_BTE, positions_BT = self._prefill_state(run, block), inputs.prefill_positions_BP
            mask, slot = self.masks.prefill(chunk, block), BlockKVSlot()
        else:
            hidden_BTE, positions_BT = self._decode_state(run, block), inputs.decode_positions_BD
            mask, slot = self.masks.decode(chunk, block), _slot(run, self._written_kv(run, block))
        self._run(run, stage, block, hidden_BTE, positions_BT, mask, slot)

    def inputs(self, chunk: int) -> Handoff:
        """Inputs of both stages on a chunk."""
        if chunk not in self._inputs:
            self._inputs[chunk] = handoff(
                self.calibration.chunks[chunk], self.objective.first_token
            )
        return self._inputs[chunk]

    def _pass(
        self,
        candidate: Candidate,
        chunk: int,
        default_rules: Mapping[int, KVTransfer],
        healing: Healing = NO_HEALING,
    ) -> _Pass:
        blocks = self.runner.num_blocks
        prefill = healing.skips(candidate, "prefill", blocks)
        decode = healing.skips(candidate, "decode", blocks)
        wanted = candidate.transfers(default_rules)
        rules = tuple(
            kv_rule(b, SEND_ALL if decode[b] & ATTENTION else wanted.get(b, SEND_ALL))
            for b in range(blocks)
        )
        fits = {(fit.stage, fit.kind, fit.block): fit for fit in healing.fits(candidate)}
        return _Pass(chunk, self.inputs(chunk), prefill, decode, rules, fits)

    def _reference(self, chunk: int) -> Reference:
        """The dense stages' outputs with uncut KV, which candidates are compared with."""
        reference = self._cache.get(("reference", chunk))
        if reference is None:
            logits_BCV = self._logits(self._pass(DENSE, chunk, {}))
            reference = reference_of(self.objective, logits_BCV)
            self._cache.put(("reference", chunk), reference, dense=True)
        return reference

    def _logits(self, run: _Pass) -> torch.Tensor:
        """Logits of every continuation token, ``(B, C, V)``.

        If prefill runs to the end anyway, it goes first, so that all its KV is written before
        decode.
        """
        if not run.inputs.first_from_prefill:
            return self.runner.logits(self._decode_state(run))
        prompt_BPE = self._prefill_state(run, self.runner.num_blocks)
        decoded_BDE = self._decode_state(run)
        last_B = run.inputs.num_prefilled_B.to(prompt_BPE.device) - 1
        rows_B = torch.arange(len(last_B), device=last_B.device)
        last_B1E = prompt_BPE[rows_B, last_B][:, None]
        return self.runner.logits(torch.cat([last_B1E, decoded_BDE], dim=1))

    def _prefill_state(self, run: _Pass, block: int) -> torch.Tensor:
        """Prefill's hidden states that enter ``block``, ``(B, P, E)``."""
        start, hidden_BPE = block, None
        while start and hidden_BPE is None:
            state = self._find(("prefill", run.chunk, run.prefill[:start]), run)
            hidden_BPE = state[0] if state else None
            start -= hidden_BPE is None
        if hidden_BPE is None:
            hidden_BPE = self.runner.embed(run.inputs.prefill_ids_BP)
        positions_BP = run.inputs.prefill_positions_BP
        for current in range(start, block):
            if run.prefill[current] & ATTENTION and not run.decode[current] & ATTENTION:
                self._write_kv(run, current, hidden_BPE)
            mask = self.masks.prefill(run.chunk, current)
            slot = BlockKVSlot()
            hidden_BPE = self._run(run, "prefill", current, hidden_BPE, positions_BP, mask, slot)
            if slot.written:
                self._keep_kv(run, current, slot.written)
            self._keep(("prefill", run.chunk, run.prefill[: current + 1]), (hidden_BPE,), run)
        return hidden_BPE

    def _kv(self, run: _Pass, block: int) -> KV:
        """The KV of ``block`` that decode reads: prefill's entries after the transfer.

        It has room for decode's own entries behind it, as all KV in this module has.
        """
        rule = transfer_of(run.rules[block])
        if rule.encoding == "model":
            return self._written_kv(run, block)
        key = (*_kv_key(run, block), run.rules[block])
        kv = self._find(key, run)
        if kv is None:
            kv = self._encoded(self._written_kv(run, block), rule, run.inputs, block)
            self._keep(key, kv, run)
        return kv[0], kv[1]

    def _written_kv(self, run: _Pass, block: int) -> KV:
        """The KV of ``block`` that prefill wrote."""
        kv = self._find(_kv_key(run, block), run)
        if kv is None and not run.prefill[block] & ATTENTION:
            self._prefill_state(run, block + 1)  # attention writes it, unless its state was kept
            kv = self._find(_kv_key(run, block), run)
        if kv is None:
            return self._write_kv(run, block, self._prefill_state(run, block))
        return kv[0], kv[1]

    def _write_kv(self, run: _Pass, block: int, hidden_BPE: torch.Tensor) -> KV:
        """Write the KV of ``block`` from the states that enter it, without its attention."""
        kv = self._find(_kv_key(run, block), run)
        if kv is None:
            self.forwards += hidden_BPE.shape[0] * hidden_BPE.shape[1] / 2
            positions_BP = run.inputs.prefill_positions_BP
            written = self.runner.write_kv(block, hidden_BPE, positions_BP, run.refit(block))
            return self._keep_kv(run, block, written)
        return kv[0], kv[1]

    def _keep_kv(self, run: _Pass, block: int, written: KV) -> KV:
        """Keep prefill's entries of a block, in a copy with room for decode's own entries."""
        kv = with_room(written, run.inputs.decode_ids_BD.shape[1])
        self._keep(_kv_key(run, block), kv, run)
        return kv

    def _encoded(self, kv: KV, rule: KVTransfer, inputs: Handoff, block: int) -> KV:
        """KV after an encoding and back, line by line: scales cover one prompt's entries."""
        keys_BHPD, values_BHPD = kv[0].clone(), kv[1].clone()
        for row, index_N in enumerate(inputs.sent_entries(rule, self.runner.windows[block])):
            index_N = index_N.to(keys_BHPD.device)
            keys_HND, values_HND = round_trip(
                keys_BHPD[row][:, index_N], values_BHPD[row][:, index_N], rule.encoding
            )
            keys_BHPD[row, :, index_N] = keys_HND
            values_BHPD[row, :, index_N] = values_HND
        return keys_BHPD, values_BHPD

    def _decode_state(self, run: _Pass, stop: int | None = None) -> torch.Tensor:
        """Decode's hidden states ``(B, D, E)`` that enter block ``stop``; None is the end."""
        stop = self.runner.num_blocks if stop is None else stop
        start, hidden_BDE = stop, None
        while start and hidden_BDE is None:
            state = self._find(_decode_key(run, start), run)
            hidden_BDE = state[0] if state else None
            start -= hidden_BDE is None
        if hidden_BDE is None:
            hidden_BDE = self.runner.embed(run.inputs.decode_ids_BD)
        positions_BD = run.inputs.decode_positions_BD
        for block in range(start, stop):
            attends = not run.decode[block] & ATTENTION
            slot = _slot(run, self._kv(run, block)) if attends else BlockKVSlot()
            mask = self.masks.decode_bias(run.chunk, block, run.rules[block]) if attends else None
            hidden_BDE = self._run(run, "decode", block, hidden_BDE, positions_BD, mask, slot)
            self._keep(_decode_key(run, block + 1), (hidden_BDE,), run)
        return hidden_BDE

    def _run(
        self,
        run: _Pass,
        stage: Stage,
        block: int,
        hidden_BTE: torch.Tensor,
        positions_BT: torch.Tensor,
        mask: torch.Tensor | None,
        slot: BlockKVSlot,
    ) -> torch.Tensor:
        skipped = run.prefill[block] if stage == "prefill" else run.decode[block]
        self.blocks_run += 1
        parts_run = 2 - (skipped & PARTS).bit_count()
        self.forwards += hidden_BTE.shape[0] * hidden_BTE.shape[1] * parts_run / 2
        if skipped & ~PARTS:
            unit = run.fits.get((stage, "bridge", block)) or Pair.of_mark(stage, block, skipped)
            return self.runner.run_healed(unit, hidden_BTE, positions_BT, mask, slot)
        return self.runner.run(block, skipped, hidden_BTE, positions_BT, mask, slot)

    def _find(self, key: _Key, run: _Pass) -> Tensors | None:
        return run.held.get(key) or self._cache.get(key)

    def _keep(self, key: _Key, tensors: Tensors, run: _Pass) -> None:
        self._cache.put(key, tensors, dense=run.is_dense)
        if key[0] == "prefill":  # the rest of a pass needs only its newest prefill state
            for old in [k for k in run.held if k[0] == "prefill"]:
                del run.held[old]
        if key[0] != "decode":
            run.held[key] = tensors


def _slot(run: _Pass, kv: KV) -> BlockKVSlot:
    """A slot in which decode's entries follow those of the prompt."""
    return BlockKVSlot(prefix=kv, room=run.inputs.decode_ids_BD.shape[1])


def _kv_key(run: _Pass, block: int) -> _Key:
    return ("kv", run.chunk, block, run.prefill[:block], run.refit(block))


def _decode_key(run: _Pass, block: int) -> _Key:
    attended = [b for b in range(block) if not run.decode[b] & ATTENTION]
    prefill = run.prefill[: attended[-1]] if attended else ()
    refits = tuple(filter(None, map(run.refit, attended)))
    return ("decode", run.chunk, run.decode[:block], prefill, refits, run.rules[:block])
