"""The compiler's estimate of a program's time."""

from __future__ import annotations

import pytest

from v4_jax.config import Config
from v4_jax.planning import cycles
from v4_jax.planning.expectations import DYNAMIC_TURNS, OnMean
from v4_jax.planning.hlo import Expected, Program, Share
from v4_jax.planning.hlo_collectives import collectives
from v4_jax.planning.kernels import Cycles
from v4_jax.planning.links import Links
from v4_jax.sharding.axes import resolve
from v4_jax.sharding.chips import Topology
from v4_jax.sharding.mesh import abstract_mesh
from v4_jax.sharding.split import Split

LINKS = Links(Topology.parse("v6e:2x1"), ((0, 0), (1, 0)))  # one between its two chips
SENT = 4096 / 100e9  # seconds that a link takes for a sum of 4096 bytes on two devices
ONE_MS = int(LINKS.device.clock / 1000)  # cycles of a millisecond


def operation(name, opcode, operand, scope, cycles=None):
    config = f', backend_config={{"estimated_cycles":"{cycles}"}}' if cycles else ""
    return f'  %{name} = f32[1024]{{0}} {opcode}(%{operand}), metadata={{op_name="jit(f)/{scope}/add"}}{config}\n'


TEXT = f"""HloModule m

%skip (s: f32[1024]) -> f32[1024] {{
  ROOT %s = f32[1024]{{0}} parameter(0)
}}

%do (d: f32[1024]) -> f32[1024] {{
  %d = f32[1024]{{0}} parameter(0)
{operation("dear", "exponential", "d", "layer_2/attn/compressor", 4 * ONE_MS)}\
  ROOT %last = f32[1024]{{0}} bitcast(%dear)
}}

ENTRY %main (x: f32[1024], p: s32[]) -> f32[1024] {{
  %x = f32[1024]{{0}} parameter(0)
  %p = s32[] parameter(1)
{operation("a", "negate", "x", "layer_0/attn/attention.window", ONE_MS)}\
{operation("b", "negate", "a", "layer_0/attn/attention.window", 2 * ONE_MS)}\
{operation("c", "negate", "b", "layer_0/ffn", 3 * ONE_MS)}\
  %start = (f32[1024]{{0}}, f32[1024]{{0:S(1)}}, u32[]) copy-start(%c)
  %done = f32[1024]{{0:S(1)}} copy-done(%start)
  %sum = f32[1024]{{0}} all-reduce(%done), replica_groups={{{{0,1}}}}, to_apply=%skip
  %count = s32[] add(%p, %p)
  %kernel = f32[1024]{{0}} custom-call(%sum), custom_call_target="tpu_custom_call", \
metadata={{op_name="jit(f)/layer_0/ffn/experts.ffn/grouped_matmul/pallas_call"}}
  ROOT %if = f32[1024]{{0}} conditional(%p, %kernel, %kernel), branch_computations={{%skip, %do}}, \
metadata={{op_name="jit(f)/layer_2/attn/compressor/cond"}}
}}
"""
KERNEL = ("kernel", "f32[1024]", "f32[1024]")


class Sometimes(Expected):
    def taken(self, conditional, branches):
        return 0.75, 0.25

    def share(self, kernel):
        return Share(0.5)


def test_parts_add_up():
    found = cycles.estimate(Program(TEXT), {KERNEL: Cycles(10 * ONE_MS, 0)}, LINKS, Sometimes())
    collective = cycles.COLLECTIVE + SENT
    expected = {
        "attention.window": 3e-3,
        "ffn": 3e-3,
        "experts.ffn": 5e-3,
        "collectives": collective,
        "compressor": 1e-3,
    }
    assert found.parts == pytest.approx(expected)
    assert next(iter(found.parts)) == "experts.ffn"
    assert found.seconds == pytest.approx(sum(expected.values()))
    # Three, a copy, a collective, the scalar unit's, the kernel, and a quarter of what is behind the condition.
    assert found.operations == 7.25 and not found.bounded


def test_later_visits_take_what_they_take():
    """A quarter of them first ones of 10 ms, the others 2: half of the mean, as the share says."""

    class Later(Expected):
        def share(self, kernel):
            return Share(0.5, later=0.75)

    found = cycles.estimate(Program(TEXT), {KERNEL: Cycles(10 * ONE_MS, 2 * ONE_MS)}, LINKS, Later())
    assert found.parts["experts.ffn"] == pytest.approx(0.5 * (0.25 * 10e-3 + 0.75 * 2e-3))


def test_a_kernel_takes_at_least_its_bytes():
    estimated = 'tpu_custom_call", backend_config={"cost_estimate":{"flops":"0","bytes_accessed":"1638000000"}}'
    text = TEXT.replace('tpu_custom_call"', estimated)
    found = cycles.estimate(Program(text), {KERNEL: Cycles(10, 10)}, LINKS, Expected())
    assert found.parts["experts.ffn"] == pytest.approx(1e-3)


def test_a_kernel_that_does_nothing_leaves_nothing_open():
    nothing = 'tpu_custom_call", backend_config={"cost_estimate":{"flops":"0","bytes_accessed":"0"}}'
    found = cycles.estimate(Program(TEXT.replace('tpu_custom_call"', nothing)), {}, LINKS, Expected())
    assert not found.bounded and "experts.ffn" not in found.parts


def test_a_kernel_that_is_fused_with_an_update_in_place_counts_as_itself():
    """And not as the whole buffer that its result is a part of."""
    call = next(line for line in TEXT.splitlines() if line.startswith("  %kernel ="))
    fusion = f"""%fused (buffer: f32[999,1024], sum: f32[1024], n: s32[]) -> f32[999,1024] {{
  %buffer = f32[999,1024]{{1,0}} parameter(0)
  %sum = f32[1024]{{0}} parameter(1)
  %n = s32[] parameter(2)
{call}
  ROOT %in = f32[999,1024]{{1,0}} dynamic-update-slice(%buffer, %kernel, %n, %n)
}}

ENTRY"""
    update = "  %all = f32[999,1024]{1,0} fusion(%all, %sum, %p), kind=kCustom, calls=%fused"
    text = TEXT.replace(call, update).replace("ENTRY", fusion).replace("(%p, %kernel, %kernel)", "(%p, %sum, %sum)")
    found, apart = (
        cycles.estimate(Program(x), {KERNEL: Cycles(10 * ONE_MS, 0)}, LINKS, Sometimes()) for x in (text, TEXT)
    )
    assert found.parts == pytest.approx(apart.parts) and found.operations == apart.operations


SUM = "replica_groups={{0,1}}, to_apply=%skip"


def beside(sum_of: str, between: str, rest: str = "") -> str:
    """A program of 1 ms of work before a sum of two devices' numbers, some beside it, and 1 ms after it."""
    return f"""HloModule m

%skip (s: f32[1024]) -> f32[1024] {{
  ROOT %s = f32[1024]{{0}} parameter(0)
}}
{rest}
ENTRY %main (x: f32[1024]) -> f32[1024] {{
  %x = f32[1024]{{0}} parameter(0)
{operation("a", "negate", "x", "layer_0/attn", ONE_MS)}\
{sum_of}
{between}\
{operation("last", "negate", "sum", "layer_0/attn", ONE_MS)}}}
"""


WORK = operation("b", "negate", "a", "layer_0/ffn", ONE_MS)
WHOLE = beside(f"  %sum = f32[1024]{{0}} all-reduce(%a), {SUM}", WORK)
PAIR = beside(
    f"  %start = (f32[1024]{{0}}, f32[1024]{{0}}) all-reduce-start(%a), {SUM}",
    WORK + "  %sum = f32[1024]{0} all-reduce-done(%start)\n",
)
ELSEWHERE = beside(
    "  %start = ((f32[1024]{0}), f32[1024]{0}) call-start(%a), to_apply=%core",
    WORK + "  %sum = f32[1024]{0} call-done(%start)\n",
    f"""
%core (c: f32[1024]) -> f32[1024] {{
  %c = f32[1024]{{0}} parameter(0)
  ROOT %summed = f32[1024]{{0}} all-reduce(%c), {SUM}
}}
""",
)


def part_of_chain(name: str, more: str) -> str:
    return f"""
%{name} (p_{name}: f32[1024]) -> f32[1024] {{
  %p_{name} = f32[1024]{{0}} parameter(0)
  %of_{name} = f32[1024]{{0}} all-reduce(%p_{name}), {SUM}, frontend_attributes={{chain_id="7"}}
{more}
}}
"""


FUSIONS = beside(
    '  %start = f32[1024]{0} fusion(%a), kind=kCustom, calls=%begin, backend_config={"estimated_cycles":"0"}',
    WORK.replace("negate(%a)", "fusion(%start), kind=kCustom, calls=%go_on")
    + '  %sum = f32[1024]{0} fusion(%b), kind=kCustom, calls=%end, backend_config={"estimated_cycles":"0"}\n',
    part_of_chain("begin", '  ROOT %r = f32[1024]{0} custom-call(%of_begin), custom_call_target="AsyncCollectiveStart"')
    + part_of_chain("go_on", "  ROOT %g = f32[1024]{0} negate(%p_go_on)")
    + part_of_chain("end", '  ROOT %e = f32[1024]{0} custom-call(%of_end), custom_call_target="AsyncCollectiveDone"'),
)


@pytest.mark.parametrize(("sent", "waited"), [(0.25, 0.0), (4.0, 3.0)])
@pytest.mark.parametrize("text", [PAIR, ELSEWHERE, FUSIONS], ids=["pair", "elsewhere", "fusions"])
def test_a_collective_counts_as_what_is_waited_for_it(text, sent, waited, monkeypatch):
    """Milliseconds, beside one of work."""
    monkeypatch.setattr(cycles, "COLLECTIVE", 1e-3 * sent - SENT)
    whole, apart = (cycles.estimate(Program(x), {}, LINKS, Expected()) for x in (WHOLE, text))
    assert whole.parts["collectives"] == pytest.approx(1e-3 * sent)
    assert apart.parts.get("collectives", 0) == pytest.approx(1e-3 * waited)
    assert apart.seconds == pytest.approx(3e-3 + 1e-3 * waited) and apart.parts["ffn"] == whole.parts["ffn"]
    (found,) = collectives(Program(text))
    assert (found.kind, found.nbytes, found.group) == ("all-reduce", 4096, 2)


def test_collectives_share_the_interconnect(monkeypatch):
    """The second of two that start together arrives when both have been sent."""
    monkeypatch.setattr(cycles, "COLLECTIVE", 2e-3 - SENT)
    start = f"  %other = (f32[1024]{{0}}, f32[1024]{{0}}) all-reduce-start(%a), {SUM}\n  %start"
    done = "  %waste = f32[1024]{0} all-reduce-done(%other)\n  %sum"
    text = PAIR.replace("  %start", start).replace("  %sum", done)
    found = cycles.estimate(Program(text), {}, LINKS, Expected())
    assert found.parts["collectives"] == pytest.approx(3e-3)


def test_a_short_collective_is_not_kept_by_a_long_one(monkeypatch):
    """One of 5 ms begins before the other of 1 ms, which has arrived after 1 ms of work."""
    monkeypatch.setattr(cycles, "COLLECTIVE", 1e-3 - SENT)
    start = f"  %long = (f32[100000000]{{0}}, f32[100000000]{{0}}) all-reduce-start(%x), {SUM}\n  %start"
    text = PAIR.replace("  %start", start) + "  %late = f32[100000000]{0} all-reduce-done(%long)\n"
    text = text.replace("}\n  %late", "  %late") + "}\n"
    found = cycles.estimate(Program(text), {}, LINKS, Expected())
    assert found.parts["collectives"] == pytest.approx(4e-3, rel=1e-4)


def test_what_is_waited_for_at_once_goes_first(monkeypatch):
    """A sum of 2 ms begins 1 ms after another, which takes 4 ms then, beside 1 ms of work and all of the first."""
    monkeypatch.setattr(cycles, "COLLECTIVE", 2e-3 - SENT)
    first = WORK + f"  %now = f32[1024]{{0}} all-reduce(%b), {SUM}\n"
    text = PAIR.replace(WORK, first)
    found = cycles.estimate(Program(text), {}, LINKS, Expected())
    assert found.parts["collectives"] == pytest.approx(2e-3 + 1e-3) and found.seconds == pytest.approx(6e-3)


def test_a_sum_of_which_each_device_keeps_a_part_is_sent_once():
    scatter = f"""
%scatter (p: f32[2048]) -> f32[1024] {{
  %p = f32[2048]{{0}} parameter(0)
  %all = f32[2048]{{0}} all-reduce(%p), {SUM}
  %zero = s32[] constant(0)
  ROOT %mine = f32[1024]{{0}} dynamic-slice(%all, %zero), dynamic_slice_sizes={{1024}}
}}
"""
    text = beside("  %sum = f32[1024]{0} fusion(%a), kind=kCustom, calls=%scatter", WORK, scatter)
    found = cycles.estimate(Program(text), {}, LINKS, Expected())
    assert found.parts["collectives"] == pytest.approx(cycles.COLLECTIVE + SENT)
    assert found.operations == 4 and found.parts.keys() == {"collectives", "attn", "ffn"}
    (one,) = collectives(Program(text))
    assert (one.kind, one.nbytes, one.sent) == ("reduce-scatter", 4096, 4096)


@pytest.mark.parametrize("written", ["", ', backend_config={"estimated_cycles":"9223372036854775807"}'])
def test_an_operation_without_an_estimate_costs_what_the_smallest_do(written):
    text = TEXT.replace(f', backend_config={{"estimated_cycles":"{3 * ONE_MS}"}}', written)
    found = cycles.estimate(Program(text), {}, LINKS, Expected())
    assert found.bounded == ("kernel",)
    assert found.parts["ffn"] == pytest.approx(cycles.OPERATION / LINKS.device.clock)


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        (
            "jit(call)/Transformer/Transformer._layers/layer_0/attn/attention.window_cache/gather",
            "attention.window_cache",
        ),
        ("jit(call)/while/body/block_0/ffn/experts.dispatch/experts.sort/sort", "experts.sort"),
        ("jit(f)/ffn/experts.dispatch/while/body/transpose(jvp(experts.ffn))/cond/pallas_call", "experts.ffn"),
        ("jit(call)/while/body/block_0/attn/attn._compress/compressor/cond", "compressor"),
        ("jit(call)/Transformer/Transformer._layers/while/body/dynamic_slice", "the compiler's own"),
        ("", "the compiler's own"),
    ],
)
def test_parts_have_the_names_of_scopes(op_name, part):
    assert cycles.part_of(op_name) == part


def decoding(rows):
    split = Split.on(abstract_mesh({"data": 1, "seq": 1, "expert": 1, "tensor": 8}), resolve("decode"), 1, 1)
    return OnMean(Program(TEXT), Config.flash(), rows, rows, True, split)


def named(name):
    return next(i for c in Program(TEXT).computations.values() for i in c.instructions.values() if i.name == name)


def test_a_block_is_completed_now_and_then():
    """Layer 2 of Flash is CSA, of four tokens to an entry."""
    assert decoding(1).taken(named("if"), 2) == pytest.approx((0.75, 0.25))
    assert decoding(2).taken(named("if"), 2)[1] == pytest.approx(1 - 0.75**2)


def test_what_is_no_choice_is_taken():
    assert decoding(1).taken(named("if"), 1) == (1,)


def test_the_first_exchange_stands_before_the_loop_of_the_others(monkeypatch):
    monkeypatch.setattr(Program, "communicates", lambda self, loop: True)
    text = TEXT.replace("ffn/experts.ffn/grouped_matmul", "ffn/experts.dispatch/while")
    loop = next(i for c in Program(text).computations.values() for i in c.instructions.values() if i.is_kernel)
    assert training().trips(loop) == 0


def test_few_tokens_reach_few_experts():
    """One token of Flash has 6 of 256 experts, of which a device of 8 holds 32."""
    share = decoding(1).share(named("kernel"))
    assert share.cycles * DYNAMIC_TURNS == pytest.approx(0.75, rel=0.03) and share.nbytes == pytest.approx(
        0.75 / 32, rel=0.03
    )
    many = decoding(4096).share(named("kernel"))
    visits = many.cycles * DYNAMIC_TURNS
    assert visits >= 32 and many.later == pytest.approx(1 - 32 / visits) and share.later < 0.1


def test_few_tokens_reach_few_experts_in_one_kernel():
    """The same share of the experts' kernel; the expert that all rows visit is always visited."""

    def share(place):
        text = TEXT.replace("experts.ffn/grouped_matmul", place)
        kernel = next(i for c in Program(text).computations.values() for i in c.instructions.values() if i.is_kernel)
        return decoding(1).share(kernel)

    found = share("experts.ffn/experts")
    assert (found.cycles, found.nbytes) == pytest.approx((0.75 / 32, 0.75 / 32), rel=0.03)
    assert share("experts.shared/experts") == Share()


def training():
    """16K tokens on each of 128 devices that share the experts."""
    split = Split.on(abstract_mesh({"data": 1, "seq": 1, "expert": 128, "tensor": 1}), resolve("train"), 1, 1)
    return OnMean(Program(TEXT), Config.flash(), 128 * 16384, 1, False, split)


def test_two_thirds_of_the_places_that_training_exchanges_hold_rows():
    text = TEXT.replace("experts.ffn/grouped_matmul", "experts.ffn/cond/branch_0_fun/experts_hidden")
    kernel = next(i for c in Program(text).computations.values() for i in c.instructions.values() if i.is_kernel)
    assert training().share(kernel)[:3] == pytest.approx((2 / 3,) * 3)


EXCHANGED = "ragged-all-to-all(%x, %y), replica_groups=[1,128]<=[128]"
BESIDE_OTHERS = """  %begun = ((bf16[98304,32,128]{2,1,0}, bf16[147456,32,128]{2,1,0}), bf16[147456,32,128]{2,1,0}) \
ragged-all-to-all-start(%x, %y), replica_groups=[1,128]<=[128]
  ROOT %ragged.1 = bf16[147456,32,128]{2,1,0} ragged-all-to-all-done(%begun)"""


@pytest.mark.parametrize("waves", [1, 2])
@pytest.mark.parametrize("exchange", [f"  ROOT %ragged.1 = bf16[147456,32,128]{{2,1,0}} {EXCHANGED}", BESIDE_OTHERS])
def test_what_an_exchange_brings_is_counted_and_not_its_room(exchange, waves):
    text = f"""HloModule m

ENTRY %main (x: bf16[98304,32,128], y: bf16[147456,32,128]) -> bf16[147456,32,128] {{
  %x = bf16[98304,32,128]{{2,1,0}} parameter(0)
  %y = bf16[147456,32,128]{{2,1,0}} parameter(1)
{exchange}
}}
"""
    for rows in (98304, 147456):
        text = text.replace(f"[{rows},", f"[{rows // waves},")
    (found,) = collectives(text, training())
    assert found.nbytes * waves == 2 * 98304 * 4096
    assert collectives(text)[0].nbytes * waves == 2 * 147456 * 4096


@pytest.mark.parametrize(("name", "trips"), [("while", 2), ("while/body/while", 48)])
def test_walks_over_experts_within_an_exchange(name, trips, monkeypatch):
    """Two experts on each device, and 48 tiles of 1,024 rows for each."""
    monkeypatch.setattr(Program, "communicates", lambda self, loop: False)
    text = TEXT.replace("ffn/experts.ffn/grouped_matmul", f"ffn/experts.dispatch/while/body/experts.ffn/{name}")
    text = text.replace("/pallas_call", "")
    loop = next(i for c in Program(text).computations.values() for i in c.instructions.values() if i.is_kernel)
    assert training().trips(loop) == trips


def test_visits_of_a_hundred_rows():
    """128 rows of Flash are three to an expert: one visit each, and none of the one in twenty that nobody chose."""
    text = TEXT.replace("experts.ffn/grouped_matmul", "experts.ffn/visit_experts")
    kernel = next(i for c in Program(text).computations.values() for i in c.instructions.values() if i.is_kernel)
    assert decoding(128).share(kernel).cycles == pytest.approx(0.95, rel=0.01)
    many = decoding(1024).share(kernel)  # 24 rows: three visits, and often a fourth that is not full
    assert 3.3 < many.cycles < 3.6
