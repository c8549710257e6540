"""Scores candidates on one chunk, and reuses every state that an earlier candidate computed.

A state is named by exactly what it depends on (:mod:`rayapp.pruning.evaluator.candidate_pass`), and
looked up before it is computed.

So a candidate restarts at its first changed block, siblings share prefixes when they come in order,
and a candidate that changes decode alone reuses the whole prefill. Results never depend on which
states were reused: the same operation runs on the same shapes either way.

Only real tokens are run, all lines of a chunk in one row; only KV and attention have padding, and
only the states that predict a scored token meet the head, a slice of them at a time.
Shapes: B = lines, P = prompt tokens, D = tokens that decode runs, N = real tokens of all lines,
E = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from rayapp.kv.quantize import round_trip
from rayapp.models.likelihood import slice_tokens
from rayapp.plan import SEND_ALL, KVTransfer, Stage
from rayapp.pruning.candidates.candidate import (
    ATTENTION,
    DENSE,
    Candidate,
    kv_rule,
    transfer_of,
)
from rayapp.pruning.candidates.healing import NO_HEALING, PARTS, HealedUnit, Healing, Pair
from rayapp.pruning.evaluator.block_runner import KV, BlockKVSlot, BlockRunner, with_room
from rayapp.pruning.evaluator.calibration import Calibration
from rayapp.pruning.evaluator.candidate_pass import CandidatePass, Key
from rayapp.pruning.evaluator.handoff import Handoff, handoff
from rayapp.pruning.evaluator.masks import Masks
from rayapp.pruning.evaluator.objective import Reference, line_sum, reference_of, token_values
from rayapp.pruning.evaluator.state_cache import StateCache, Tensors
from rayapp.pruning.settings.compute import CACHE_BYTES
from rayapp.pruning.settings.objective import Objective

LineSums = tuple[float, ...]


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
        forwards: Block x token forwards so far. A part counts one half, and so does the KV of a
            block that is written without its attention.
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
        token_ids_N = lines.continuations_BC[self.inputs(chunk).valid_BC]
        states = [
            self._predicting_states(self._pass(c, chunk, self.objective.kv_transfer, healing))
            for c in candidates
        ]
        values = [list[torch.Tensor]() for _ in candidates]
        for rows, reference in self._slices(chunk):
            for state_NE, found in zip(states, values, strict=True):
                logits_NV = self.runner.logits(state_NE[None, rows])[0]
                found.append(token_values(self.objective, reference, logits_NV, token_ids_N[rows]))
        counts_B = lines.continuation_lengths_B.tolist()
        return [
            tuple(line_sum(self.objective, v_C) for v_C in torch.cat(found).cpu().split(counts_B))
            for found in values
        ]

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
            return run.inputs.prefill_tokens.apart(self._prefill_state(run, block))[0]
        return run.inputs.decode_tokens.apart(self._decode_state(run, block))[0]

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
            hidden_1NE, positions_1N = self._prefill_state(run, block), inputs.prefill_positions_1N
            mask = self.masks.prefill(chunk, block)
            slot = BlockKVSlot(tokens=inputs.prefill_tokens)
        else:
            hidden_1NE, positions_1N = self._decode_state(run, block), inputs.decode_positions_1N
            mask, slot = self.masks.decode(chunk, block), _slot(run, self._written_kv(run, block))
        self._run(run, stage, block, hidden_1NE, positions_1N, mask, slot)

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
    ) -> CandidatePass:
        blocks = self.runner.num_blocks
        prefill = healing.skips(candidate, "prefill", blocks)
        decode = healing.skips(candidate, "decode", blocks)
        wanted = candidate.transfers(default_rules)
        rules = tuple(
            kv_rule(b, SEND_ALL if decode[b] & ATTENTION else wanted.get(b, SEND_ALL))
            for b in range(blocks)
        )
        fits = {(fit.stage, fit.kind, fit.block): fit for fit in healing.fits(candidate)}
        return CandidatePass(chunk, self.inputs(chunk), prefill, decode, rules, fits)

    def _slices(self, chunk: int) -> Iterator[tuple[slice, Reference | None]]:
        """Scored tokens that meet the head together, so that the memory of logits is bounded.

        With them comes what candidates are compared with there: the dense stages' outputs with
        uncut KV, or None if the objective is no comparison.
        """
        num_tokens = int(self.inputs(chunk).valid_BC.sum())
        step = slice_tokens(self.runner.vocab_size)
        dense_NE = None
        for start in range(0, num_tokens, step):
            rows, key = slice(start, start + step), ("reference", chunk, start)
            reference = self._cache.get(key)
            if reference is None and self.objective.kind == "kl":
                if dense_NE is None:
                    dense_NE = self._predicting_states(self._pass(DENSE, chunk, {}))
                logits_NV = self.runner.logits(dense_NE[None, rows])[0]
                reference = reference_of(self.objective, logits_NV)
                self._cache.put(key, reference, dense=True)
            yield rows, reference

    def _predicting_states(self, run: CandidatePass) -> torch.Tensor:
        """The states ``(N, E)`` that predict every continuation token, line by line.

        If prefill runs to the end anyway, it goes first, so that all its KV is written before
        decode.
        """
        inputs = run.inputs
        if not inputs.first_from_prefill:
            return self._decode_state(run)[0]
        prompt_1NE = self._prefill_state(run, self.runner.num_blocks)
        joined_NE = torch.cat([prompt_1NE[0], self._decode_state(run)[0].to(prompt_1NE.device)])
        return joined_NE[inputs.predicting_N.to(joined_NE.device)]

    def _prefill_state(self, run: CandidatePass, block: int) -> torch.Tensor:
        """Prefill's hidden states that enter ``block``, ``(1, N, E)``."""
        start, hidden_1NE, inputs = block, None, run.inputs
        while start and hidden_1NE is None:
            state = self._find(("prefill", run.chunk, run.prefill[:start]), run)
            hidden_1NE = state[0] if state else None
            start -= hidden_1NE is None
        if hidden_1NE is None:
            ids_1N = inputs.prefill_tokens.joined([inputs.prefill_ids_BP])
            hidden_1NE = self.runner.embed(ids_1N)
        positions_1N = inputs.prefill_positions_1N
        for current in range(start, block):
            if run.prefill[current] & ATTENTION and not run.decode[current] & ATTENTION:
                self._write_kv(run, current, hidden_1NE)
            mask = self.masks.prefill(run.chunk, current)
            slot = BlockKVSlot(tokens=inputs.prefill_tokens)
            hidden_1NE = self._run(run, "prefill", current, hidden_1NE, positions_1N, mask, slot)
            if slot.written:
                self._keep_kv(run, current, slot.written)
            self._keep(("prefill", run.chunk, run.prefill[: current + 1]), (hidden_1NE,), run)
        return hidden_1NE

    def _kv(self, run: CandidatePass, block: int) -> KV:
        """The KV of ``block`` that decode reads: prefill's entries after the transfer.

        It has room for decode's own entries behind it, as all KV in this module has.
        """
        rule = transfer_of(run.rules[block])
        if rule.encoding == "model":
            return self._written_kv(run, block)
        key = (*run.kv_key(block), run.rules[block])
        kv = self._find(key, run)
        if kv is None:
            kv = self._encoded(self._written_kv(run, block), rule, run.inputs, block)
            self._keep(key, kv, run)
        return kv[0], kv[1]

    def _written_kv(self, run: CandidatePass, block: int) -> KV:
        """The KV of ``block`` that prefill wrote."""
        kv = self._find(run.kv_key(block), run)
        if kv is None and not run.prefill[block] & ATTENTION:
            self._prefill_state(run, block + 1)  # attention writes it, unless its state was kept
            kv = self._find(run.kv_key(block), run)
        if kv is None:
            return self._write_kv(run, block, self._prefill_state(run, block))
        return kv[0], kv[1]

    def _write_kv(self, run: CandidatePass, block: int, hidden_1NE: torch.Tensor) -> KV:
        """Write the KV of ``block`` from the states that enter it, without its attention."""
        kv = self._find(run.kv_key(block), run)
        if kv is None:
            self.forwards += hidden_1NE.shape[1] / 2
            inputs = run.inputs
            written = self.runner.write_kv(
                block,
                hidden_1NE,
                inputs.prefill_positions_1N,
                inputs.prefill_tokens,
                run.refit(block),
            )
            return self._keep_kv(run, block, written)
        return kv[0], kv[1]

    def _keep_kv(self, run: CandidatePass, block: int, written: KV) -> KV:
        """Keep prefill's entries of a block, in a copy with room for decode's own entries."""
        kv = with_room(written, run.inputs.decode_ids_BD.shape[1])
        self._keep(run.kv_key(block), kv, run)
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

    def _decode_state(self, run: CandidatePass, stop: int | None = None) -> torch.Tensor:
        """Decode's hidden states ``(1, N, E)`` that enter block ``stop``; None is the end."""
        stop = self.runner.num_blocks if stop is None else stop
        start, hidden_1NE, inputs = stop, None, run.inputs
        while start and hidden_1NE is None:
            state = self._find(run.decode_key(start), run)
            hidden_1NE = state[0] if state else None
            start -= hidden_1NE is None
        if hidden_1NE is None:
            hidden_1NE = self.runner.embed(inputs.decode_tokens.joined([inputs.decode_ids_BD]))
        positions_1N = inputs.decode_positions_1N
        if not positions_1N.numel():  # All answers have one token, which prefill predicts.
            return hidden_1NE
        for block in range(start, stop):
            attends = not run.decode[block] & ATTENTION
            slot = _slot(run, self._kv(run, block)) if attends else BlockKVSlot()
            mask = self.masks.decode_bias(run.chunk, block, run.rules[block]) if attends else None
            hidden_1NE = self._run(run, "decode", block, hidden_1NE, positions_1N, mask, slot)
            self._keep(run.decode_key(block + 1), (hidden_1NE,), run)
        return hidden_1NE

    def _run(
        self,
        run: CandidatePass,
        stage: Stage,
        block: int,
        hidden_1NE: torch.Tensor,
        positions_1N: torch.Tensor,
        mask: torch.Tensor | None,
        slot: BlockKVSlot,
    ) -> torch.Tensor:
        skipped = run.prefill[block] if stage == "prefill" else run.decode[block]
        self.blocks_run += 1
        parts_run = 2 - (skipped & PARTS).bit_count()
        self.forwards += hidden_1NE.shape[1] * parts_run / 2
        if skipped & ~PARTS:
            unit = run.fits.get((stage, "bridge", block)) or Pair.of_mark(stage, block, skipped)
            return self.runner.run_healed(unit, hidden_1NE, positions_1N, mask, slot)
        return self.runner.run(block, skipped, hidden_1NE, positions_1N, mask, slot)

    def _find(self, key: Key, run: CandidatePass) -> Tensors | None:
        return run.held.get(key) or self._cache.get(key)

    def _keep(self, key: Key, tensors: Tensors, run: CandidatePass) -> None:
        self._cache.put(key, tensors, dense=run.is_dense)
        if key[0] == "prefill":  # the rest of a pass needs only its newest prefill state
            for old in [k for k in run.held if k[0] == "prefill"]:
                del run.held[old]
        if key[0] != "decode":
            run.held[key] = tensors


def _slot(run: CandidatePass, kv: KV) -> BlockKVSlot:
    """A slot in which decode's entries follow those of the prompt."""
    inputs = run.inputs
    return BlockKVSlot(prefix=kv, room=inputs.decode_ids_BD.shape[1], tokens=inputs.decode_tokens)
