"""The correction loop: guess a text, embed the guess, let a corrector look at the difference, repeat.

After Morris et al. 2023, "Text Embeddings Reveal (Almost) As Much As Text", section 3. The loop knows nothing
about networks: it takes three callables, each with the weights as its first argument, so that weights are
arguments of the compiled program and never constants in it:

    hypothesize(params, e [B, E], k)                              -> ids [B, k, L], score [B, k]
    propose(params, e [rows, E], ids [rows, L], emb [rows, E], k) -> ids [rows, k, L], score [rows, k]
    embed(params, ids [rows, L])                                  -> [rows, E]

`hypothesize` makes the first guesses (the inverter: greedy for k = 1, else beam search), `propose` the
corrector's candidates for rows = B * W hypotheses, `embed` is the embedder under attack. All three must be
deterministic.

Shapes: B batch, L tokens, E embedding width, W sequence beam, K candidates a hypothesis, N steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from v2t_jax.errors import InputError, check_whole
from v2t_jax.inversion.torch_order import topk_order
from v2t_jax.parallel.processes import fetch

MOST_STEPS = 100_000
MOST_BEAMS = 64  # W, and K: a step decodes B * W * K sequences
MEMORY = 4  # hypotheses remembered in mode "best", as a multiple of W
PAD_ID, EOS_ID = 0, 1  # every model vocabulary of this package is numbered so

Mode = Literal["best", "upstream"]
Params = Any  # any pytree of arrays
Hypothesize = Callable[[Params, Array, int], tuple[Array, Array]]
Propose = Callable[[Params, Array, Array, Array, int], tuple[Array, Array]]
Embed = Callable[[Params, Array], Array]


@dataclass(frozen=True)
class CorrectionSettings:
    """How the loop searches.

    Attributes:
        sequence_beam_width: W, hypotheses kept for each item between steps.
        num_candidates: K, candidates for each hypothesis; None means W. In mode "upstream" at least W.
        mode: "best" searches best first: it remembers the MEMORY * W nearest hypotheses ever seen, makes at each step
            the candidates of the W nearest whose candidates it hasn't made, and stops finished rows.
            "upstream" is the original's selection: only the last step's candidates count, no row stops.
        tolerance: in mode "best" a row whose cosine reaches 1 - tolerance is frozen. An error of relative
            size r in a vector costs r^2 / 2 of cosine, so embedding the same text again in float32, or a
            target stored as float16, stays within 1e-6, rounding included; different texts lie much further
            off. An embedder computing in bfloat16 may need 1e-4.
        patience: in mode "best" a row also stops after this many steps without a better cosine; 0 = never.
        scan_chunk: steps in one call of the compiled program; in between the host reports and may stop.
        guess_length: in mode "upstream", tokens of a first guess that goes on to be corrected; None = all. (The
            original cuts those shorter than the guess it returns for 0 steps.)
    """

    sequence_beam_width: int = 4
    num_candidates: int | None = None
    mode: Mode = "best"
    tolerance: float = 1e-5
    patience: int = 0
    scan_chunk: int = 4
    guess_length: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("best", "upstream"):
            raise InputError(f'mode is {self.mode!r}: choose "best" or "upstream".')
        least = {"sequence_beam_width": 1, "num_candidates": 1, "patience": 0, "scan_chunk": 1, "guess_length": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value, minimum)
        for name in ("sequence_beam_width", "num_candidates"):
            if (getattr(self, name) or 0) > MOST_BEAMS:
                raise InputError(f"{name} is {getattr(self, name)}: give at most {MOST_BEAMS}.")
        if not 0 <= self.tolerance < 1:
            raise InputError(f"tolerance is {self.tolerance}: give a number from 0 to below 1, such as 1e-5.")
        if self.mode == "upstream" and self.patience:
            raise InputError('patience works in mode "best" only: leave it 0 in mode "upstream".')
        if self.mode == "best" and self.guess_length is not None:
            raise InputError('guess_length works in mode "upstream" only: leave it None in mode "best".')

    @property
    def candidates(self) -> int:
        """K with the defaults filled in."""
        k = self.num_candidates or self.sequence_beam_width
        return max(k, self.sequence_beam_width) if self.mode == "upstream" else k


class Correction(NamedTuple):
    """What the loop found; numpy arrays.

    In mode "best" the answer is the hypothesis of highest cosine ever seen and the trace shows the best so
    far after each step (index 0: the first guess). In mode "upstream" both show the hypothesis selected at
    that step.
    """

    ids: np.ndarray  # [B, L] int32
    cosine: np.ndarray  # [B] float32, of the embedded ids and the target
    step: np.ndarray  # [B] int32, the step at which ids was found
    trace_ids: np.ndarray  # [B, N + 1, L] int32; steps that early exit spared repeat the last one run
    trace_cosine: np.ndarray  # [B, N + 1] float32
    steps_run: int  # steps executed, at most N


class _Beam(NamedTuple):
    """State of each item. Slots are ranked; one with cosine -inf only fills the shape and has no children.

    M slots: W in mode "upstream", which forgets all else; MEMORY * W in mode "best", where each step expands the best
    W that weren't expanded yet.
    """

    ids: Array  # [B, M, L] int32, pad after eos
    emb: Array  # [B, M, E] float32
    cosine: Array  # [B, M] float32
    expanded: Array  # [B, M] bool, its children have been made
    step: Array  # [B] int32, when slot 0 was found
    stale: Array  # [B] int32, steps since slot 0 got better
    done: Array  # [B] bool


_Seen = tuple[Array, Array, Array, Array]


def _seen(beam: _Beam, ran: Array) -> _Seen:
    """What the host sees of a step: slot 0's ids [B, L] and cosine [B], done [B], whether the step ran []."""
    return beam.ids[:, 0], beam.cosine[:, 0], beam.done, ran


def cosine_similarity(a: Array, b: Array) -> Array:
    """Cosine over the last axis in float32; -inf where it is not a number: such a candidate never wins."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    # Multiply and add, not a matmul: accelerators round matmul inputs, and here differences of 1e-6 decide.
    norms = jnp.sqrt(jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1))
    cosine = jnp.sum(a * b, axis=-1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)
    return jnp.where(jnp.isnan(cosine), -jnp.inf, jnp.clip(cosine, -1.0, 1.0))


def _pad_after_eos(ids: Array) -> Array:
    """Makes equal texts equal arrays, whatever a callable leaves behind eos."""
    is_eos = (ids == EOS_ID).astype(jnp.int32)
    return jnp.where(jnp.cumsum(is_eos, axis=-1) - is_eos > 0, PAD_ID, ids).astype(jnp.int32)


class _Pool(NamedTuple):
    """Hypotheses of each item, P of them."""

    ids: Array  # [B, P, L]
    emb: Array  # [B, P, E]
    cosine: Array  # [B, P]
    expanded: Array  # [B, P]


def _keep_distinct(pool: _Pool, score: Array, width: int) -> _Pool:
    """The best distinct hypotheses of each pool.

    Args:
        score: [B, P] float32; -inf or NaN: absent. Of equal ids the first present counts; ties: first in front.
        width: how many to keep; a pool of fewer leaves fillers.

    Returns:
        the kept, best first; fillers are slot 0 again at cosine -inf.
    """
    present = score > -jnp.inf
    equal = jnp.all(pool.ids[:, :, None, :] == pool.ids[:, None, :, :], axis=-1)  # [B, P, P]
    earlier = jnp.tri(pool.ids.shape[1], k=-1, dtype=bool)[None]
    duplicate = jnp.any(equal & earlier & present[:, None, :], axis=-1)
    size = min(width, pool.ids.shape[1])
    top, index = lax.top_k(jnp.where(present & ~duplicate, score, -jnp.inf), size)
    missing = ((0, 0), (0, width - size))
    top, index = jnp.pad(top, missing, constant_values=-jnp.inf), jnp.pad(index, missing)
    filler = (top == -jnp.inf) & (jnp.arange(width) > 0)[None]
    kept = _take(pool, jnp.where(filler, index[:, :1], index))
    return kept._replace(cosine=jnp.where(filler, -jnp.inf, kept.cosine))


def _take(pool: _Pool, index: Array) -> _Pool:
    """Hypotheses `index` [B, n] of each pool."""
    return _Pool(*(jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1) for x in pool))


def check_num_steps(num_steps: int) -> None:
    """Raises:
    InputError: num_steps is no whole number, negative, or would never end.
    """
    check_whole("num_steps", num_steps, 0, MOST_STEPS)


def _check_embeddings(e: np.ndarray | Array) -> None:
    if e.ndim != 2 or e.shape[0] == 0:
        raise InputError(f"The embeddings have shape {e.shape}: give [texts, width] with at least one row.")


class CorrectionLoop:
    """The loop over fixed callables and settings, compiled once for each shape of the embeddings.

    Two programs: `start` (first guesses, embedded and ranked) and `advance` (a scan over `scan_chunk` steps;
    a step is skipped when `num_steps` is reached or every row is done). `num_steps` is an argument of the
    program, so one compile serves every N, every set of weights and every batch of the same shape.
    """

    def __init__(self, hypothesize: Hypothesize, propose: Propose, embed: Embed, settings: CorrectionSettings) -> None:
        self.settings = settings
        self._hypothesize, self._propose, self._embed = hypothesize, propose, embed
        self._start = jax.jit(self._start_program)
        self._advance = jax.jit(self._advance_program, donate_argnames="beam")

    def __call__(
        self,
        params: Params,
        e: np.ndarray | Array,
        num_steps: int,
        on_step: Callable[[int, float, int], None] | None = None,
    ) -> Correction:
        """Recovers the texts behind e.

        Args:
            params: weights, handed to the three callables as they are.
            e: target embeddings [B, E].
            num_steps: N, correction steps; 0 returns the best first guess (for W = K = 1 and in mode
                "upstream" the inverter's greedy one).
            on_step: called as on_step(step, mean cosine, rows done) for the first guesses (step 0) and then
                after every chunk of steps.

        Raises:
            InputError: e is not [B, E] with at least one row, or num_steps is negative.
        """
        _check_embeddings(e)
        check_num_steps(num_steps)
        e = jnp.asarray(e, jnp.float32)
        beam, seen = self._start(params, e, np.int32(num_steps))
        ids, cosine, done, _ = fetch(seen)
        trace_ids, trace_cosine, steps_run = [ids], [cosine], 0
        if on_step is not None:
            on_step(0, float(cosine.mean()), int(done.sum()))
        while steps_run < num_steps and not done.all():
            beam, seen = self._advance(params, e, beam, np.int32(steps_run), np.int32(num_steps))
            ids, cosine, done, ran = fetch(seen)
            count, done = int(ran.sum()), done[-1]  # the steps that ran come first in a chunk
            trace_ids.extend(ids[:count])
            trace_cosine.extend(cosine[:count])
            steps_run += count
            if on_step is not None:
                on_step(steps_run, float(cosine[-1].mean()), int(done.sum()))
        spared = num_steps - steps_run
        trace_ids += trace_ids[-1:] * spared
        trace_cosine += trace_cosine[-1:] * spared
        return Correction(
            ids=np.array(trace_ids[-1]),
            cosine=np.array(trace_cosine[-1]),
            step=fetch(beam.step),
            trace_ids=np.stack(trace_ids, axis=1),
            trace_cosine=np.stack(trace_cosine, axis=1),
            steps_run=steps_run,
        )

    def _start_program(self, params: Params, e: Array, num_steps: Array) -> tuple[_Beam, _Seen]:
        """First guesses, embedded and ranked."""
        width, upstream = self.settings.sequence_beam_width, self.settings.mode == "upstream"
        # As many guesses as a step makes candidates: no more rows than it decodes, and more to choose from.
        ids, _ = self._hypothesize(params, e, 1 if upstream else width * self.settings.candidates)
        ids = _pad_after_eos(ids)
        if self.settings.guess_length is not None:
            cut = (num_steps > 0) & (jnp.arange(ids.shape[-1]) >= self.settings.guess_length)
            ids = jnp.where(cut[None, None], PAD_ID, ids)
        emb, cosine = self._embed_pool(params, e, ids)
        if upstream:
            # The original starts from one hypothesis. Copies of it keep the shapes static; being duplicates
            # they become fillers, whose children do not count.
            ids, emb, cosine = (jnp.repeat(x, width, axis=1) for x in (ids, emb, cosine))
        pool = _Pool(ids, emb, cosine, jnp.zeros(cosine.shape, bool))
        kept = _keep_distinct(pool, cosine, width if upstream else MEMORY * width)
        zero = jnp.zeros(e.shape[0], jnp.int32)
        done = jnp.zeros(e.shape[0], bool) if upstream else kept.cosine[:, 0] >= 1 - self.settings.tolerance
        beam = _Beam(*kept, step=zero, stale=zero, done=done)
        return beam, _seen(beam, jnp.array(True))

    def _advance_program(
        self, params: Params, e: Array, beam: _Beam, first_step: Array, num_steps: Array
    ) -> tuple[_Beam, _Seen]:
        """Up to `scan_chunk` steps, and what the host sees of each."""

        def body(beam: _Beam, offset: Array) -> tuple[_Beam, _Seen]:
            step = first_step + offset + 1
            run = (step <= num_steps) & ~jnp.all(beam.done)
            beam = lax.cond(run, lambda b: self._step(params, e, b, step, num_steps), lambda b: b, beam)
            return beam, _seen(beam, run)

        return lax.scan(body, beam, jnp.arange(self.settings.scan_chunk, dtype=jnp.int32))

    def _step(self, params: Params, e: Array, beam: _Beam, step: Array, num_steps: Array) -> _Beam:
        """One round of correction of every item."""
        settings, upstream = self.settings, self.settings.mode == "upstream"
        width = settings.sequence_beam_width
        batch, memory, length = beam.ids.shape
        held = _Pool(beam.ids, beam.emb, beam.cosine, beam.expanded)
        # The corrector is deterministic: a second time it would make the same children.
        open_cosine = jnp.where(held.expanded, -jnp.inf, held.cosine)
        index = jnp.tile(jnp.arange(width), (batch, 1)) if upstream else lax.top_k(open_cosine, width)[1]
        parents = _take(held, index)
        ids, log_prob = self._propose(
            params,
            jnp.repeat(e, width, axis=0),
            parents.ids.reshape(batch * width, length),
            parents.emb.reshape(batch * width, -1),
            settings.candidates,
        )
        ids = _pad_after_eos(ids.reshape(batch, -1, length))
        emb, cosine = self._embed_pool(params, e, ids)
        # A filler repeats slot 0 and, but for rounding, its children. Without those, the first pool in mode
        # "upstream" is exactly the children of the one hypothesis.
        childless = parents.expanded | (parents.cosine == -jnp.inf)
        cosine = jnp.where(jnp.repeat(childless, settings.candidates, axis=1), -jnp.inf, cosine)
        children = _Pool(ids, emb, cosine, jnp.zeros(cosine.shape, bool))
        if upstream:
            if width == 1:  # the original without a sequence beam: the corrector's own score, no re-ranking
                score = log_prob.reshape(batch, -1).astype(jnp.float32)
            else:  # of equal cosines it takes the first in the last step, and before that any, by torch's sorting
                in_order = jnp.broadcast_to(jnp.arange(cosine.shape[1], dtype=jnp.int32)[None], cosine.shape)
                children = _take(children, jnp.where(step == num_steps, in_order, topk_order(cosine)))
                score = children.cosine
            kept = _keep_distinct(children, score, width)
            return _Beam(*kept, jnp.full_like(beam.step, step), beam.stale, beam.done)
        chosen = jnp.any(index[:, :, None] == jnp.arange(memory)[None, None], axis=1)
        held = held._replace(expanded=held.expanded | chosen)
        # What is held comes first: a child that repeats it is the duplicate, and among ties the older stays. So slot
        # 0 never gets worse: it is the best hypothesis ever seen, since `step`. Whatever was expanded and then
        # dropped can't come back: by then all that is held lies nearer.
        pool = _Pool(*(jnp.concatenate(pair, axis=1) for pair in zip(held, children, strict=True)))
        kept = _keep_distinct(pool, pool.cosine, memory)
        better = kept.cosine[:, 0] > beam.cosine[:, 0]
        stale = jnp.where(better, 0, beam.stale + 1)
        exhausted = jnp.all(kept.expanded | (kept.cosine == -jnp.inf), axis=1)
        done = exhausted | (kept.cosine[:, 0] >= 1 - settings.tolerance)
        if settings.patience:
            done |= stale >= settings.patience
        moved = _Beam(*kept, jnp.where(better, step, beam.step), stale, done)

        def unless_done(old: Array, new: Array) -> Array:
            return jnp.where(beam.done.reshape((batch,) + (1,) * (old.ndim - 1)), old, new)

        return jax.tree.map(unless_done, beam, moved)

    def _embed_pool(self, params: Params, e: Array, ids: Array) -> tuple[Array, Array]:
        """Embeds ids [B, P, L]: embeddings [B, P, E] and their cosines to e [B, P], float32."""
        batch, pool, length = ids.shape
        emb = self._embed(params, ids.reshape(batch * pool, length))
        emb = emb.astype(jnp.float32).reshape(batch, pool, -1)
        return emb, cosine_similarity(emb, e[:, None, :])


def correct_in_batches(
    loop: CorrectionLoop,
    params: Params,
    e: np.ndarray,
    num_steps: int,
    batch_size: int,
    on_progress: Callable[[int, float], None] | None = None,
    place: Callable[[np.ndarray], Array] = jnp.asarray,
) -> Correction:
    """Runs the loop over e in batches that fit memory; the result does not depend on the split.

    Every batch has the same shape (the last is filled up by repeating a row), so there is one compile.

    Args:
        loop: the loop.
        params: its weights.
        e: target embeddings [T, E], any number of rows from 1.
        num_steps: N.
        batch_size: rows of a batch; e with fewer rows is one batch of its own size.
        on_progress: called as on_progress(texts done, mean cosine of the current batch) whenever the loop
            reports. A batch at step s of N counts for its share s / N.
        place: puts a batch where the weights are; with its rows cut over several devices, each does its part.

    Returns:
        One Correction for all rows; steps_run is the largest of any batch.

    Raises:
        InputError: batch_size is under 1, or as `CorrectionLoop.__call__`.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: give at least 1.")
    _check_embeddings(e)
    total = len(e)
    size = min(batch_size, total)
    parts = []
    for first in range(0, total, size):
        batch = np.asarray(e[first : first + size])
        rows = len(batch)
        batch = np.concatenate([batch, np.repeat(batch[-1:], size - rows, axis=0)])

        def on_step(step: int, cosine: float, _: int, first: int = first, rows: int = rows) -> None:
            if on_progress is not None:
                on_progress(first + rows * step // max(num_steps, 1), cosine)

        parts.append(loop(params, place(batch), num_steps, on_step))
        if on_progress is not None:
            on_progress(first + rows, float(parts[-1].cosine[:rows].mean()))
    *arrays, steps_run = zip(*parts, strict=True)
    # Only the end of the last batch is filling.
    return Correction._make([*(np.concatenate(batches)[:total] for batches in arrays), max(steps_run)])
