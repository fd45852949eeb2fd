"""The correction loop: guess a text, embed the guess, let proposers improve on it, repeat.

After Morris et al. 2023, "Text Embeddings Reveal (Almost) As Much As Text", section 3. The loop knows no network, only
deterministic functions that take the weights first, as arguments of the compiled program:

    hypothesize(params, e [B, E], k)            -> ids [B, k, L]    first guesses
    propose(params, hypotheses of R rows, k)    -> ids [R, n, L]    candidates, n of each proposer's own
    edit(params, hypotheses of R rows, look)    -> Pool [R, n]      candidates of the rounds that follow the steps;
                                                                    look(ids [R, k, L]) -> Pool embeds them
    embed(params, ids [R, L])                   -> [R, E]           the embedder under attack

Shapes: B batch, L tokens, E embedding width, W sequence beam, N steps.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from v2t_jax.decode.state import EOS, PAD, truncate_after_eos
from v2t_jax.errors import InputError, check_whole
from v2t_jax.inversion.parts import by_parts
from v2t_jax.inversion.pool import Pool, keep_distinct, nothing_ranked, take
from v2t_jax.parallel.processes import fetch

MOST_STEPS = 100_000
MOST_BEAMS = 64  # W: a step decodes B * W * W sequences
MEMORY = 4  # hypotheses remembered in mode "best", as a multiple of W
TRACE_STEPS = 32  # steps that a program's trace has room for; runs of more steps take the next power of two
# An error of relative size r in a vector costs r^2 / 2 of cosine, so the same text embedded again in float32, or a
# target stored as float16, stays within 1e-6, rounding included; different texts lie much further off.
TOLERANCE = 1e-5

Mode = Literal["best", "upstream"]
Search = Literal["corrector", "edits", "both"]  # both: rounds of edits behind the corrector's steps
STEPS: dict[Search, int] = {"corrector": 8, "edits": 0, "both": 2}  # by default; edits go on faster than more steps
Params = Any  # any pytree of arrays


class Hypotheses(NamedTuple):
    """What a proposer sees: R hypotheses, each with its target."""

    e: Array  # [R, E]
    ids: Array  # [R, L]
    embedding: Array  # [R, E] of ids
    similarity: Array  # [R] of embedding and e


Hypothesize = Callable[[Params, Array, int], Array]
Propose = Callable[[Params, Hypotheses, int], Array]
Embed = Callable[[Params, Array], Array]
Look = Callable[[Array], "Pool"]
Edit = Callable[[Params, Hypotheses, Look], "Pool"]


@dataclass(frozen=True)
class CorrectionSettings:
    """How the loop searches.

    Mode "best" searches best first: it remembers the MEMORY * W nearest hypotheses ever seen, expands at each step the
    W nearest that it hasn't expanded, and stops rows that are solved. What mode "upstream" does is in upstream.py.
    """

    sequence_beam_width: int = 4  # W, hypotheses kept for each target between steps, and candidates for each of them
    mode: Mode = "best"
    patience: int = 0  # in mode "best" a row also stops after this many steps without improvement; 0 = never
    guess_length: int | None = None  # in mode "upstream", tokens kept of a first guess to be corrected; None = all

    def __post_init__(self) -> None:
        if self.mode not in ("best", "upstream"):
            raise InputError(f'mode is {self.mode!r}; choose "best" or "upstream".')
        check_whole("sequence_beam_width", self.sequence_beam_width, 1, MOST_BEAMS)
        check_whole("patience", self.patience, 0)
        if self.mode == "upstream" and self.patience:
            raise InputError('patience works only in mode "best"; leave it 0 in mode "upstream".')


class Correction(NamedTuple):
    """What the loop found. The trace shows the best hypothesis so far, or in mode "upstream" each step's selection."""

    ids: np.ndarray  # [B, L] int32
    similarity: np.ndarray  # [B] float32, of the embedded ids and the target
    runner_up: np.ndarray  # [B] float32, of the second nearest hypothesis at the end; -1 if there is none
    step: np.ndarray  # [B] int32, the step at which ids was found
    trace_ids: np.ndarray  # [B, N + 1, L] int32; steps that early exit saved repeat the last one run
    trace_similarity: np.ndarray  # [B, N + 1] float32
    trace_calls: np.ndarray  # [B, N + 1] int32, texts that the embedder was given; a gradient counts as 3
    steps_run: int  # steps executed, at most N


class Beam(NamedTuple):
    pool: Pool  # ranked; W hypotheses in mode "upstream", which forgets all others, and MEMORY * W in "best"
    step: Array  # [B] int32, when the first of the pool was found
    stale: Array  # [B] int32, steps since it got better
    done: Array  # [B] bool
    calls: Array  # [B] int32, of the embedder


class State(NamedTuple):
    beam: Beam
    step: Array  # [] int32, steps run
    trace_ids: Array  # [B, T + 1, L] int32, T steps at most
    trace_similarity: Array  # [B, T + 1] float32
    trace_calls: Array  # [B, T + 1] int32


def cosine_similarity(a: Array, b: Array) -> Array:
    """Cosine over the last axis, in float32."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    # Multiply and add, not a matmul: accelerators round matmul inputs, and here differences of 1e-6 decide.
    norms = jnp.sqrt(jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1))
    return jnp.clip(jnp.sum(a * b, axis=-1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny), -1.0, 1.0)


def at_longest(run: Callable[..., Array], used: Array, *rows: Array) -> Array:
    """`run(*rows)` of rows [R, N] cut to a half or three quarters, where no row has anything `used` [R, N] behind."""
    lengths = [-(-used.shape[1] * quarters // 4) for quarters in (2, 3, 4)]
    runs = [lambda *rows, n=n: run(*(x[:, :n] for x in rows)) for n in lengths]
    return lax.switch(sum(jnp.any(used[:, n:]) for n in lengths[:-1]), runs, *rows)


def is_solved(cosine: Array) -> Array:
    """Whether a hypothesis of this cosine is taken for the text itself."""
    return cosine >= 1 - TOLERANCE


class CorrectionLoop:
    """The loop over fixed functions and settings: first guesses and all steps in one compiled program.

    One compile serves all N up to TRACE_STEPS, all weights and all batches of a shape. Where somebody watches, the same
    two parts run as programs of their own, step by step.
    """

    def __init__(
        self,
        hypothesize: Hypothesize,
        proposers: Sequence[Propose],  # their candidates are pooled; W are asked of each
        embed: Embed,
        settings: CorrectionSettings,
        *,
        edit: Edit | None = None,  # for rounds of edits, which follow the steps and expand one hypothesis each
        edit_calls: int = 0,  # of the embedder in a round: its candidates, and what `edit` itself asks
        devices: int = 1,  # that the rows of a batch lie on
        step_rows: int | None = None,  # of a device that are corrected at a time, if they divide a batch; None: all
        edit_rows: int | None = None,  # that are edited at a time
        similarity: Callable[[Array, Array], Array] = cosine_similarity,  # of embeddings and targets [..., E]
        solved: Callable[[Array], Array] = is_solved,  # similarity [B] -> whether a row is finished; in mode "best"
        # similarity [B, P] -> indices, best first, in mode "upstream" before its last step; None: ties in place
        rank: Callable[[Array], Array] | None = None,
        check: Callable[[], None] = lambda: None,  # raises what a host function raised in a program that has ended
    ) -> None:
        self.settings = settings
        self._hypothesize, self._proposers, self._embed = hypothesize, tuple(proposers), embed
        self._similarity, self._solved, self._rank, self._check = similarity, solved, rank, check
        self._edit, self.edit_calls = edit, edit_calls
        self.devices, self.step_rows, self.edit_rows = devices, step_rows, edit_rows
        self.run = jax.jit(self._run, static_argnames="room")
        self.start = jax.jit(self._start, static_argnames="room")
        self.advance = jax.jit(self._advance, donate_argnames="state")

    def __call__(
        self,
        params: Params,
        e: np.ndarray | Array,
        num_steps: int,
        on_step: Callable[[int, float], None] | None = None,
        num_rounds: int = 0,
        rows: int | None = None,
    ) -> Correction:
        """Recovers the texts behind targets e [B, E] in N correction steps; 0 give the best first guess.

        `on_step` is called with the step and the mean similarity after the first guesses (step 0) and after each step.
        Rounds of edits follow; they count as steps N + 1, N + 2, ... Targets from `rows` on only fill the shape.
        """
        e, steps, total = jnp.asarray(e, jnp.float32), np.int32(num_steps), num_steps + num_rounds
        first = np.int32(len(e) if rows is None else rows), steps
        room = max(TRACE_STEPS, 1 << (max(total, 1) - 1).bit_length())
        if on_step is None and total > 0:
            state = self.run(params, e, *first, np.int32(total), room=room)
        else:  # without steps no corrector is needed, and a model may have none
            state = self.start(params, e, *first, room=room)
            before = -1
            while on_step is not None:
                now, similarity = fetch((state.step, state.beam.pool.similarity[:, 0]))
                self._check()
                if now == before:  # every row is done
                    break
                on_step(int(now), float(similarity[:rows].mean()))
                if now == total:
                    break
                before, state = now, self.advance(params, e, state, now + 1, steps, np.int32(total))
        found, now, last, *traces = fetch((state.beam.step, state.step, state.beam.pool.similarity, *state[2:]))
        self._check()
        shown = np.minimum(np.arange(total + 1), now)
        ids, similarity, calls = (trace[:, shown] for trace in traces)
        runner_up = last[:, 1:2].max(axis=1, initial=-1.0)
        return Correction(ids[:, -1], similarity[:, -1], runner_up, found, ids, similarity, calls, int(now))

    def calls_at(self, step: int, num_steps: int) -> int:
        """Calls of the embedder for a text up to a step; steps behind `num_steps` are rounds of edits."""
        each = self.settings.sequence_beam_width**2
        guesses = 1 if self.settings.mode == "upstream" else each
        return guesses + each * min(step, num_steps) + self.edit_calls * max(step - num_steps, 0)

    def rounds_within(self, budget: int, num_steps: int) -> int:
        """How many rounds of edits, of a loop that has them, fit into a budget of calls behind `num_steps` steps."""
        if self._edit is None:
            return 0
        least = self.calls_at(num_steps + 1, num_steps)
        if budget < least:
            raise InputError(
                f"A budget of {budget} leaves no round of edits behind {num_steps} steps; give {least} or more."
            )
        return (budget - self.calls_at(num_steps, num_steps)) // self.edit_calls

    def _run(self, params: Params, e: Array, rows: Array, num_steps: Array, total: Array, room: int) -> State:
        return self._advance(params, e, self._start(params, e, rows, num_steps, room), total, num_steps, total)

    def _start(self, params: Params, e: Array, rows: Array, num_steps: Array, room: int) -> State:
        beam = self.first_beam(params, e, rows, num_steps)
        # Made of the beam, so that the rows of the trace lie where the beam's do.
        first = (beam.pool.ids, beam.pool.similarity, beam.calls[:, None])
        trace = (jnp.repeat(x[:, :1], room + 1, axis=1) for x in first)
        return State(beam, jnp.int32(0), *trace)

    def _advance(self, params: Params, e: Array, state: State, until: Array, num_steps: Array, total: Array) -> State:
        """Steps, up to step `until` of `total`, or until every row is done."""

        def step(state: State) -> State:
            now = state.step + 1
            if self._edit is None:
                beam = self.step(params, e, state.beam, now, num_steps)
            elif not self._proposers:  # there is no corrector
                beam = self.edit(params, e, state.beam, now, num_steps)
            else:
                beam = lax.cond(now <= num_steps, self.step, self.edit, params, e, state.beam, now, num_steps)
            found = beam.pool.ids[:, 0], beam.pool.similarity[:, 0], beam.calls
            traces = (lax.dynamic_update_index_in_dim(t, x, now, axis=1) for t, x in zip(state[2:], found, strict=True))
            return State(beam, now, *traces)

        def goes_on(state: State) -> Array:
            finished = state.beam.done
            if self._edit is not None:  # what the steps have exhausted may still be edited
                finished &= self._ended(state.beam.pool) | (state.step > num_steps) | (total <= num_steps)
            return (state.step < until) & ~jnp.all(finished)

        return lax.while_loop(goes_on, step, state)

    def _ended(self, pool: Pool) -> Array:
        """[B]: nothing can improve on a row, in mode "best"."""
        return self._solved(pool.similarity[:, 0]) | nothing_ranked(pool)

    def first_beam(self, params: Params, e: Array, rows: Array, num_steps: Array) -> Beam:
        """The beam before any step; `num_steps` decides whether first guesses are cut to be corrected."""
        width, upstream = self.settings.sequence_beam_width, self.settings.mode == "upstream"
        # As many guesses as a step makes candidates: no more rows than it decodes, and more to choose from.
        ids = self._hypothesize(params, e, 1 if upstream else width**2)
        ids = truncate_after_eos(ids.astype(jnp.int32))  # equal texts become equal arrays
        if self.settings.guess_length is not None:
            cut = (num_steps > 0) & (jnp.arange(ids.shape[-1]) >= self.settings.guess_length)
            ids = jnp.where(cut[None, None], PAD, ids)
        pool = self._pool(params, e, ids, absent=(jnp.arange(len(e)) >= rows)[:, None])
        if upstream:
            # The original starts from one hypothesis; its copies become fillers, whose candidates do not count.
            pool = Pool(*(jnp.repeat(x, width, axis=1) for x in pool))
        kept = keep_distinct(pool, width if upstream else MEMORY * width)
        done = nothing_ranked(pool) if upstream else self._ended(kept)
        zero = jnp.zeros(e.shape[0], jnp.int32)
        return Beam(kept, step=zero, stale=zero, done=done, calls=zero + ids.shape[1])

    def step(self, params: Params, e: Array, beam: Beam, step: Array, num_steps: Array) -> Beam:
        """One round of correction of every row that isn't done."""
        width = self.settings.sequence_beam_width
        if self.settings.mode == "upstream":
            expand = functools.partial(lax.cond, step == 1, self._first_children, self._children)  # from one parent
            children = (expand if width > 1 else self._children)(params, e, beam.pool)
            if self._rank is not None and width > 1:
                in_order = jnp.arange(children.ids.shape[1], dtype=jnp.int32)[None]
                children = take(children, jnp.where(step == num_steps, in_order, self._rank(children.similarity)))
            done = beam.done | nothing_ranked(children)
            calls = beam.calls + width**2
            return Beam(keep_distinct(children, width), jnp.full_like(beam.step, step), beam.stale, done, calls)
        expand = functools.partial(self._expanded, params, step, width, self._children, width**2)
        after: Beam = by_parts(expand, self.step_rows, self.devices, beam.done, e, beam)
        return after

    def edit(self, params: Params, e: Array, beam: Beam, step: Array, num_steps: Array) -> Beam:
        """One round of edits of every row that isn't done: they are made of the nearest hypothesis not yet edited."""
        first = step == num_steps + 1  # what the steps have expanded hasn't been edited
        pool = beam.pool._replace(expanded=beam.pool.expanded & ~first)
        done = jnp.where(first, self._ended(pool), beam.done)
        beam = beam._replace(pool=pool, done=done, stale=jnp.where(first, 0, beam.stale))

        expand = functools.partial(self._expanded, params, step, 1, self._edits, self.edit_calls)
        after: Beam = by_parts(expand, self.edit_rows, self.devices, beam.done, e, beam)
        return after

    def _expanded(
        self, params: Params, step: Array, width: int, expand: Callable[..., Pool], calls: int, e: Array, beam: Beam
    ) -> Beam:
        """The beam with the candidates of its `width` nearest hypotheses that haven't been expanded."""
        batch, memory, _ = beam.pool.ids.shape
        # The proposers are deterministic: a second time they would make the same children.
        unexpanded = jnp.where(beam.pool.expanded, -jnp.inf, beam.pool.similarity)
        index = lax.top_k(unexpanded, width)[1]
        children = expand(params, e, take(beam.pool, index))
        chosen = jnp.any(index[:, :, None] == jnp.arange(memory)[None, None], axis=1)
        held = beam.pool._replace(expanded=beam.pool.expanded | chosen)
        # What is held comes first: a child that repeats it is the duplicate, and among ties the older stays. What was
        # expanded and then dropped can't come back: by then all that is held lies nearer.
        pool = Pool(*(jnp.concatenate(pair, axis=1) for pair in zip(held, children, strict=True)))
        kept = keep_distinct(pool, memory)
        better = kept.similarity[:, 0] > beam.pool.similarity[:, 0]
        stale = jnp.where(better, 0, beam.stale + 1)
        exhausted = jnp.all(kept.expanded | (kept.similarity == -jnp.inf), axis=1)
        done = exhausted | self._solved(kept.similarity[:, 0]) | nothing_ranked(children)
        if self.settings.patience:
            done |= stale >= self.settings.patience
        moved = Beam(kept, jnp.where(better, step, beam.step), stale, done, beam.calls + calls)

        def unless_done(old: Array, new: Array) -> Array:
            return jnp.where(beam.done.reshape((batch,) + (1,) * (old.ndim - 1)), old, new)

        return jax.tree.map(unless_done, beam, moved)

    def _edits(self, params: Params, e: Array, parents: Pool) -> Pool:
        """A round's edits of parents [B, 1]."""
        ids, embedding, similarity, expanded = (x[:, 0] for x in parents)
        childless = (expanded | (similarity == -jnp.inf))[:, None]
        assert self._edit is not None
        given = Hypotheses(e, ids, embedding, similarity)
        embed = self._embed if self.edit_rows is None else self.trimmed
        return self._edit(params, given, lambda candidates: self._pool(params, e, candidates, childless, embed))

    def _children(self, params: Params, e: Array, parents: Pool, most: int | None = None) -> Pool:
        """The candidates of every proposer for parents [B, P]: each makes `most` of each parent, or P."""
        batch, width, length = parents.ids.shape
        rows = [x.reshape(batch * width, *x.shape[2:]) for x in (parents.ids, parents.embedding, parents.similarity)]
        hypotheses = Hypotheses(jnp.repeat(e, width, axis=0), *rows)
        ids = jnp.concatenate([propose(params, hypotheses, most or width) for propose in self._proposers], axis=1)
        each = ids.shape[1]
        ids = truncate_after_eos(ids.reshape(batch, width * each, length).astype(jnp.int32))
        childless = parents.expanded | (parents.similarity == -jnp.inf)  # fillers repeat the first
        return self._pool(params, e, ids, absent=jnp.repeat(childless, each, axis=1))

    def _first_children(self, params: Params, e: Array, parents: Pool) -> Pool:
        """As `_children` where all parents but the first are fillers, which aren't decoded then."""
        width = parents.ids.shape[1]
        found = self._children(params, e, Pool(*(x[:, :1] for x in parents)), width)
        missing = (width - 1) * found.ids.shape[1]
        filled = Pool(*(jnp.concatenate([x, jnp.repeat(x[:, :1], missing, axis=1)], axis=1) for x in found))
        return filled._replace(similarity=filled.similarity.at[:, -missing:].set(-jnp.inf))

    def trimmed(self, params: Params, ids: Array) -> Array:
        """Embeddings of edited texts. The longest of them decides how many tokens the embedder is given of each."""
        return at_longest(functools.partial(self._embed, params), ids > EOS, ids)

    def _pool(
        self, params: Params, e: Array, ids: Array, absent: Array | bool = False, embed: Embed | None = None
    ) -> Pool:
        """Hypotheses ids [B, P, L], embedded and compared with e; those `absent` [B, P] only fill the shape."""
        batch, size, length = ids.shape
        embedding = (embed or self._embed)(params, ids.reshape(batch * size, length))
        embedding = embedding.astype(jnp.float32).reshape(batch, size, -1)
        similarity = self._similarity(embedding, e[:, None, :])
        similarity = jnp.where(absent | jnp.isnan(similarity), -jnp.inf, similarity)
        return Pool(ids, embedding, similarity, jnp.zeros(similarity.shape, bool))
