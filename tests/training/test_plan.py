"""The cost read from compiled programs, compared with sums written out here and with unrolled programs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moon_jax import cli, sharding
from moon_jax import config as config_lib
from moon_jax.errors import UserError
from moon_jax.model.encoder import composition
from moon_jax.training import chips, hlo, loop, plan
from tests.conftest import tiny


def compiled(function, *shapes, **options):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile(compiler_options=options or None)


def cost(function, *shapes):
    return hlo.Program(compiled(function, *shapes).as_text()).cost()


def test_a_matmul_counts_two_flops_per_multiplication():
    found = cost(lambda a, b: a @ b, (64, 32), (32, 48))
    assert found.flops == 2 * 64 * 32 * 48
    assert found.bytes == 4 * (64 * 32 + 32 * 48 + 64 * 48)
    found = cost(lambda a, b: jnp.einsum("gmd,gdf->gmf", a, b), (5, 64, 32), (5, 32, 48))
    assert found.flops == 2 * 5 * 64 * 32 * 48


@pytest.mark.parametrize("layers", [1, 3, 7])
def test_a_scanned_program_costs_what_the_unrolled_one_costs(layers):
    """Forward and backward through a stack of layers. XLA's own analysis of the scan counts one layer."""

    def loss(unroll, x, weights):
        layer = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        return jax.lax.scan(layer, x, weights, unroll=unroll)[0].sum()

    shapes = (128, 64), (layers, 64, 64)
    scanned, unrolled = (cost(jax.grad(lambda *a, u=u: loss(u, *a), (0, 1)), *shapes) for u in (1, layers))
    assert scanned.flops == unrolled.flops == 3 * layers * 2 * 128 * 64 * 64  # one forward and two backward
    assert scanned.uncounted == unrolled.uncounted == frozenset()
    # Fusion and temporaries differ; reading the whole stack in every iteration would exceed this.
    assert 0.8 < scanned.bytes / unrolled.bytes < 3


def test_nested_loops_multiply():
    def function(x, weights):
        inner = lambda x, w: (x @ w, None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(inner, x, weights)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, None, length=5)[0]

    assert cost(function, (16, 32), (3, 32, 32)).flops == 15 * 2 * 16 * 32 * 32


def test_a_loop_of_unknown_length_is_reported():
    def function(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: jnp.abs(x @ w) + 1, x)

    found = cost(function, (16, 16), (16, 16))
    assert found.flops == 2 * 16**3 and len(found.uncounted) == 1


def test_a_slice_of_a_stack_is_not_the_stack():
    """A scan over 40 matrices reads each once, not the whole stack 40 times."""
    found = cost(lambda x, ws: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0], (8, 64), (40, 64, 64))
    stack = 4 * 40 * 64 * 64
    assert stack < found.bytes < 4 * stack


@pytest.mark.parametrize(
    ("operation", "kind", "sent"),
    [
        (lambda x: jax.lax.all_gather(x, "data", tiled=True), "all-gather", 7),
        (lambda x: jax.lax.psum(x, "data"), "all-reduce", 2 * 7 / 8),
        (lambda x: jax.lax.psum_scatter(x, "data", tiled=True), "reduce-scatter", 7 / 8),
        (lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True), "all-to-all", 7 / 8),
        (lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]), "collective-permute", 1),
    ],
)
def test_collectives_by_kind(operation, kind, sent):
    mesh = sharding.make_mesh(config_lib.Mesh())
    function = jax.shard_map(operation, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"), check_vma=False)
    with jax.set_mesh(mesh):
        given = jax.ShapeDtypeStruct((8 * 64, 128), jnp.float32, sharding=sharding.rows(mesh))
        text = jax.jit(function).lower(given).compile().as_text()
    ((name, size, crosses), found), *rest = hlo.Program(text, 8).cost().collectives.items()
    assert (name, crosses, rest) == (kind, False, [])
    assert size == (2 if kind == "collective-permute" else 8)
    assert found == pytest.approx(4 * 64 * 128 * sent)


def test_each_device_sends_its_share_of_the_traffic_between_slices():
    """Two slices of four: an all-reduce of x sends 2 · 3/4 x inside a slice, and 2 · 1/2 of x/4 between slices."""
    reduced = ("all-reduce", "f32[64,128]", 4 * 64 * 128)
    gathered = ("all-gather", "f32[512,128]", 4 * 64 * 128)
    for (kind, out, x), inside, between in ((reduced, 2 * 3 / 4, 2 / 2 / 4), (gathered, 2 * 3, 1)):
        call = f"{kind}(%a), replica_groups={{{{0,1,2,3,4,5,6,7}}}}, dimensions={{0}}"
        text = f"HloModule m\n\nENTRY %main (a: f32[64,128]) -> {out} {{\n  %a = f32[64,128]{{1,0}} parameter(0)\n"
        text += f"  ROOT %c = {out}{{1,0}} {call}\n}}\n"
        found = hlo.Program(text, 8, slices=2).cost().collectives
        assert found == {(kind, 4, False): inside * x, (kind, 2, True): between * x}


TPU_LOOPS = """HloModule m

%inner_condition (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(11)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%inner_body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %step = s32[] constant(3)
  %next = s32[] add(%i, %step)
  %x = f32[8,8]{1,0:S(1)} get-tuple-element(%p), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum = f32[8,8]{1,0:S(1)} all-reduce(%y), replica_groups={{0,1,2,3}}
  ROOT %t = (s32[], f32[8,8]) tuple(%next, %sum)
}

%condition (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %start = (s32[], f32[8,8]) tuple(%two, %x)
  %loop = (s32[], f32[8,8]) while(%start), condition=%inner_condition, body=%inner_body
  %y = f32[8,8]{1,0} get-tuple-element(%loop), index=1
  %k = f32[8,8]{1,0:S(1)} custom-call(%y), custom_call_target="tpu_custom_call", config={"cost_estimate":{"flops":"7"}}
  %unknown = f32[8,8]{1,0} custom-call(%k), custom_call_target="__cublas$gemm"
  ROOT %t = (s32[], f32[8,8]) tuple(%next, %unknown)
}

ENTRY %main (a: f32[8,8]) -> (s32[], f32[8,8]) {
  %a = f32[8,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,8]) tuple(%zero, %a)
  ROOT %loop = (s32[], f32[8,8]) while(%start), condition=%condition, body=%body
}
"""


def test_loops_as_tpus_write_them():
    """Five times: two kernels, and from 2 to 11 by 3, so three times, a matmul and a sum over four devices."""
    found = hlo.Program(TPU_LOOPS, 4).cost()
    assert found.flops == 5 * (3 * 2 * 8**3 + 7)
    assert found.collectives == {("all-reduce", 4, False): 5 * 3 * 2 * 3 / 4 * 256}
    # In main memory: the matmul's result, written and read; the arrays of the kernels that are off the chip; counters.
    assert found.bytes == 5 * (3 * (2 * 256 + 12) + 256 + 256 + 12)
    assert found.uncounted == {"unknown"}  # a library's matmul, which reports no FLOPs
    assert hlo.Program(TPU_LOOPS.replace("constant(2)", "parameter(1)"), 4).cost().uncounted == {"unknown", "loop"}


LINE = "%c = f32[{out}]{{0}} convolution(%a, %b), window={{{window}}}, dim_labels={labels}"
MODULE = """HloModule m

ENTRY %main (a: f32[{a}], b: f32[{b}]) -> f32[{out}] {{
  %a = f32[{a}]{{0}} parameter(0)
  %b = f32[{b}]{{0}} parameter(1)
  ROOT {line}
}}
"""


@pytest.mark.parametrize(
    ("a", "b", "out", "window", "labels", "multiplications"),
    [
        # A plain matmul, as TPUs write it: without a window.
        ("64,32", "32,48", "64,48", "", "bf_io->bf", 64 * 32 * 48),
        # A batch of 12 as a dilated window: each output uses one of the twelve.
        ("12,64,32", "12,48,32", "12,64,48", "size=12 stride=11 lhs_dilate=12", "0bf_0oi->0bf", 12 * 64 * 32 * 48),
        # A sum over an axis of 2 as a window of 2.
        ("64,2,32", "2,32,48", "64,1,48", "size=2", "b0f_0io->b0f", 64 * 2 * 32 * 48),
        # An outer product over an axis of 2, as a padded, reversed window.
        ("64,1,32", "2,32,48", "64,2,48", "size=2 pad=1_1 rhs_reversal=1", "b0f_0io->b0f", 64 * 2 * 32 * 48),
    ],
)
def test_padding_and_dilation_do_not_count(a, b, out, window, labels, multiplications):
    line = LINE.format(out=out, window=window, labels=labels).replace("window={}, ", "")
    assert hlo.Program(MODULE.format(a=a, b=b, out=out, line=line)).cost().flops == 2 * multiplications


def test_groups_given_as_mesh_axes():
    text = "'a'=1,'b'=4,'c'=16"
    groups = hlo._mesh_groups(text, "[4,4,4]T(1,0,2", "'b'")
    expected = np.arange(64).reshape(4, 4, 4).transpose(1, 0, 2).reshape(4, 16).T
    np.testing.assert_array_equal(np.sort(groups, axis=None), np.arange(64))
    np.testing.assert_array_equal(groups, expected)
    assert hlo._mesh_groups(text, None, "'b','c':(4)4").shape == (4, 16)
    np.testing.assert_array_equal(hlo._mesh_groups("'c'=16", None, "'c':(1)4")[0], [0, 4, 8, 12])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5p:4x4x8", ("v5p", (4, 4, 8))),
        ("v5p-8", ("v5p", (2, 2, 1))),
        ("v5p-128", ("v5p", (4, 4, 4))),
        ("v5p-1024", ("v5p", (8, 8, 8))),
        ("v5litepod-16", ("v5e", (4, 4))),
        ("v6e-8", ("v6e", (2, 4))),
    ],
)
def test_slice_names(name, expected):
    assert plan.parse_topology(name) == expected


@pytest.mark.parametrize("name", ["v5p", "v9-8", "v5p:4x4", "v5p-100", "v5p-2", "v5e-3", "v5p:0x4x4", ""])
def test_an_unknown_slice_is_reported_in_one_line(name):
    with pytest.raises(UserError, match=f"--topology {name}: ") as error:
        plan.parse_topology(name)
    assert "\n" not in str(error.value)


def test_model_flops_are_three_times_the_forward_pass():
    """Written out for one row of a dense tiny model. The vocabulary of 300 tokens costs nothing."""
    config = tiny(experts__count=0, data__batch=1)
    s, p, v = 12 + 8 + 12, 24, 6  # tokens, patches and visual tokens of a row
    decoder = 2 * (24 * (48 + 24 + 24 + 48) + 3 * 24 * 40)
    tower = 2 * (16 * 48 + 16 * 16 + 2 * 16 * 24)
    mergers = 2 * (64 * 64 + 64 * 24)
    matmuls = s * decoder + p * (tower + 8 * 8 * 3 * 16) + v * mergers
    pairs = 2 * 2 * 48 * (12**2 + (s - 12) ** 2) + 2 * 2 * 16 * p**2  # 2 layers, q·k and weights·v
    assert chips.model_flops(config) == 3 * 3 * (2 * matmuls + 2 * pairs)
    # With experts a token uses K of E, and the router is one more matmul.
    sparse = tiny(experts__count=4, experts__per_token=2, experts__width=20, data__batch=1)
    more = 2 * 2 * s * (24 * 4 + 2 * 3 * 24 * 20 - 3 * 24 * 40)
    assert chips.model_flops(sparse) == chips.model_flops(config) + 9 * more


@pytest.fixture(scope="module")
def here():
    return plan.plan(tiny(experts__dispatch="dense", mesh__data=2, mesh__expert=2, mesh__tensor=2), "tiny")


def test_the_timed_step_has_full_rows():
    """Every token is valid and routed."""
    config = tiny(data__batch=4)
    batch = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), loop.abstract_batch(config, sharding.make_mesh(config.mesh))
    )
    rows = plan.full_rows(batch.rows, config.data.text_tokens)
    assert (np.asarray(composition(rows)) > 0).all()
    assert rows.segment.min() == 1 and rows.segment.max() == 2 and (rows.view == [1, 2, 3]).all()


@pytest.mark.slow
def test_a_plan_for_this_machine(here):
    assert here.chips == 8 and here.mesh == dict(data=2, fsdp=1, expert=2, tensor=2)
    assert here.measured_step_seconds > 0 and here.step_seconds is None and here.memory_bytes is None
    assert here.uncounted == [] and here.collective_bytes
    # Dense dispatch computes 4 experts instead of 2, and recomputes; no device repeats the work of another.
    assert 1 < here.flops / here.model_flops < 3
    assert here.argument_bytes > 3 * 4 * here.parameters / 8


@pytest.mark.slow
def test_the_table_and_the_json(here):
    console = loop.progress.Console(width=100, record=True)
    console.print(plan.table([here]))
    text = console.export_text()
    assert "data=2 expert=2 tensor=2" in text and f"{here.parameters:,}" in text and "step, measured" in text
    assert json.loads(json.dumps(plan.to_json(here)))["held_bytes"] == here.held_bytes


def test_command_line_mistakes_are_one_line(capsys):
    for arguments, message in (
        (["--topology", "v5p:4x4"], "a slice of v5p has 3 axes"),
        (["--mesh", "data=2,pipe=4"], "--mesh data=2,pipe=4: pipe=4 is not understood"),
        (["--slices", "0"], "--slices 0: give 1 or more"),
        (["--json", "nowhere/plan.json"], "--json nowhere/plan.json: no folder nowhere; create it first"),
        (["--mesh", "data=3"], "does not fit 8 devices"),
    ):
        assert cli.main(["plan", "--config", "quickstart", *arguments]) == 2
        assert message in capsys.readouterr().err


def libtpu():
    pytest.importorskip("libtpu", reason="no libtpu: pip install -e '.[tpu]' to compile for TPUs")


SMALL = dict(experts__width=20, training__dtype="bfloat16", data__batch=16)


@pytest.fixture(scope="module")
def for_tpu():
    """The training step of a tiny model on four v5p chips."""
    libtpu()
    config = tiny(**SMALL, mesh__data=-1, mesh__fsdp=2, mesh__expert=2, experts__dispatch="expert_parallel")
    return config, plan.plan(config, "tiny", "v5p:2x2x1")


@pytest.mark.slow
def test_a_plan_for_a_tpu(for_tpu):
    _, found = for_tpu
    assert found.chips == 4 and found.fits and found.uncounted == []
    assert found.memory_bytes == 95e9 and found.bound in ("compute", "memory", "links")
    assert set(found.seconds) == {"compute", "memory", "links", "network"} and found.seconds["network"] == 0
    assert found.step_seconds == max(found.seconds.values())
    assert 0 < found.utilization < 1
    assert found.triplets_per_second == pytest.approx(16 / found.step_seconds)
    kinds = {kind.split(" over ")[0] for kind in found.collective_bytes}
    assert {"all-to-all", "all-gather", "all-reduce"} <= kinds


@pytest.mark.slow
def test_the_cost_per_chip_is_constant_under_weak_scaling(for_tpu):
    """A small version of going from 64 to 512 chips: work that is not sharded, such as a global sort, would show."""
    config, four = for_tpu
    sixteen = plan.plan(config_lib.replace(config, {"data.batch": 64}), "tiny", "v5p:2x2x4")
    assert sixteen.flops == pytest.approx(four.flops, rel=0.02)
    assert sixteen.moved_bytes == pytest.approx(four.moved_bytes, rel=0.1)


@pytest.mark.slow
def test_lack_of_memory_is_reported_in_one_line():
    libtpu()
    config = config_lib.load("moon2_qwen3vl_2b")
    small = {"language.layers": 3, "vision.depth": 1, "vision.deepstack": (0,), "mesh.data": -1, "mesh.fsdp": 1}
    with pytest.raises(UserError, match=r"v5e:2x2: the step needs .* of a chip's memory; raise config.mesh.fsdp"):
        plan.plan(config_lib.replace(config, small), "2b", "v5e:2x2")
