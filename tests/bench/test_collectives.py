"""What programs send is read right: from programs whose traffic is known, and from lines of TPU programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from v2t_jax.bench.roofline import collectives

LAYERS, ROWS, WIDTH = 5, 32, 64


def compiled(function, *arguments):
    """The HLO of `function` on a mesh of (data 4, model 2); arguments are (shape, spec)."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in arguments]
    return jax.jit(function).lower(*shapes).compile().as_text()


def test_a_sum_over_devices_is_one_all_reduce_of_the_result():
    hlo = compiled(lambda x: jnp.sum(x, axis=0), ((ROWS, WIDTH), P("data")))
    assert collectives(hlo) == [("all-reduce", WIDTH * 4)]


def test_a_scan_counts_every_turn():
    def scan(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    hlo = compiled(scan, ((LAYERS, WIDTH, WIDTH), P(None, "data")), ((ROWS, WIDTH), P("data")))
    # Each layer's rows of weights are gathered: the whole [WIDTH, WIDTH], LAYERS times.
    assert collectives(hlo) == [("all-gather", WIDTH * WIDTH * 4)] * LAYERS


def test_nothing_is_sent_where_nothing_is_shared():
    assert collectives(compiled(jnp.tanh, ((ROWS, WIDTH), P("data")))) == []


TPU = """
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[8,128]) -> bf16[1,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.9 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
  ROOT %slice = bf16[1,128]{1,0:T(8,128)(2,1)} slice(%all-reduce.9), slice={[0:1], [0:128]}
}

%wrapped (q: f32[16]) -> f32[128] {
  %q = f32[16]{0} parameter(0)
  ROOT %inner = f32[128]{0} all-gather(%q), dimensions={0}
}

ENTRY %main (x: bf16[8,128], y: f32[16], z: pred[3]) -> f32[] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[16]{0:T(128)} parameter(1)
  %z = pred[3]{0} parameter(2)
  %fusion = bf16[1,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kOutput, calls=%fused
  %start = (f32[16]{0}, f32[64]{0:T(128)S(1)}) all-gather-start(%y), dimensions={0}
  %done = f32[64]{0} all-gather-done(%start)
  %permute = (f32[16]{0}, f32[16]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%y)
  %permuted = f32[16]{0} collective-permute-done(%permute)
  %both = (f32[16]{0}, pred[3]{0}) all-reduce-start(%y, %z), to_apply=%add
  %reduced = (f32[16]{0}, pred[3]{0}) all-reduce-done(%both)
  %async = ((f32[16]{0}), f32[128]{0}, u32[]{:S(2)}) async-start(%y), calls=%wrapped
  %awaited = f32[128]{0} async-done(%async), calls=%wrapped
  ROOT %scattered = f32[4]{0} reduce-scatter(%y), dimensions={0}, to_apply=%add
}
"""


def test_the_lines_of_tpu_programs():
    assert collectives(TPU) == [
        ("all-reduce", 8 * 128 * 2),
        ("all-gather", 64 * 4),
        ("collective-permute", 16 * 4),
        ("all-reduce", 16 * 4 + 3),
        ("all-gather", 128 * 4),
        ("reduce-scatter", 16 * 4),
    ]


LOOP = """
%condition (c: (s32[], f32[16])) -> pred[] {
  %bound = s32[]{:T(128)} constant(12)
  %c = (s32[]{:T(128)}, f32[16]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (b: (s32[], f32[16])) -> (s32[], f32[16]) {
  %b = (s32[]{:T(128)}, f32[16]{0}) parameter(0)
  %x = f32[16]{0} get-tuple-element(%b), index=1
  %begun = (f32[16]{0}, f32[64]{0}) fusion(%x), kind=kCustom, calls=%first
  %ended = f32[64]{0} fusion(%begun), kind=kCustom, calls=%second
}

%first (p: f32[16]) -> f32[64] {
  %p = f32[16]{0} parameter(0)
  ROOT %gather.1 = f32[64]{0} all-gather(%p), channel_id=7, dimensions={0}
}

%second (q: f32[16]) -> f32[64] {
  %q = f32[16]{0} parameter(0)
  ROOT %gather.2 = f32[64]{0} all-gather(%q), channel_id=7, dimensions={0}
}

ENTRY %main (x: (s32[], f32[16])) -> (s32[], f32[16]) {
  %x = (s32[]{:T(128)}, f32[16]{0}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, f32[16]{0}) while(%x), condition=%condition, body=%body
}
"""


def test_the_loops_of_tpu_programs_and_the_parts_of_one_collective():
    assert collectives(LOOP) == [("all-gather", 64 * 4)] * 12
    assert collectives(LOOP.replace("direction=LT", "direction=NE")) == [("all-gather", 64 * 4)]


@pytest.mark.parametrize("text", ["", "HloModule empty"])
def test_no_program_sends_nothing(text):
    assert collectives(text) == []
