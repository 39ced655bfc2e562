"""The reader of HLO text, on programs small enough to read by eye."""

import pytest

from sharding.hlo import Program
from sharding.strategies import Collective

# A GPU's forms: pairs of start and done, plain and wrapped, groups written in every way; a loop in a loop.
ASYNC = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%wrapped (p.0: bf16[2,8]) -> bf16[2,8] {
  %p.0 = bf16[2,8]{1,0} parameter(0)
  ROOT %trade = bf16[2,8]{1,0:T(8,128)(2,1)} all-to-all(%p.0), replica_groups=[2,4]<=[4,2]T(1,0)
}

%inner_body (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.1 = (s32[], /*index=1*/f32[4]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %x.1 = f32[4]{0} get-tuple-element(%p.1), index=1
  %gather-start = (f32[4]{0}, f32[32]{0}) all-gather-start(%x.1), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %gather-done = f32[32]{0} all-gather-done(%gather-start)
  %small = f32[4]{0} slice(%gather-done), slice={[0:4]}
  ROOT %t.1 = (s32[], f32[4]{0}) tuple(%i.1, %small)
}

%inner_condition (p.2: (s32[], f32[4])) -> pred[] {
  %p.2 = (s32[], f32[4]{0}) parameter(0)
  ROOT %true.2 = pred[] constant(true)
}

%outer_body (p.3: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.3 = (s32[], f32[4]{0}) parameter(0)
  %permuted = f32[4]{0} collective-permute(%x.3), source_target_pairs={{0,1},{1,2},{2,0}}
  %x.3 = f32[4]{0} get-tuple-element(%p.3), index=1
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %t.3 = (s32[], f32[4]{0}) tuple(%i.3, %permuted)
  ROOT %inner = (s32[], f32[4]{0}) while(%t.3), body=%inner_body, backend_config={"known_trip_count":{"n":"30"}}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0), metadata={op_name="x"}
  %y = bf16[2,8]{1,0} constant({...})
  %zero = s32[] constant(0)
  %trade-start = ((bf16[2,8]{1,0}), bf16[2,8]{1,0}) async-start(%y), calls=%wrapped
  %trade-done = bf16[2,8]{1,0} async-done(%trade-start), calls=%wrapped
  %t = (s32[], f32[4]{0}) tuple(%zero, %x)
  %outer = (s32[], f32[4]{0}) while(%t), condition=%inner_condition, body=%outer_body
  ROOT %out = f32[4]{0} get-tuple-element(%outer), index=1
}
"""

# `late` of the loop depends on `a` alone, `early` on `b` and on the device; the fusion hands each through.
FLOW = """\
HloModule jit_g

%fused (f.0: f32[4], f.1: f32[4]) -> (f32[4], f32[4]) {
  %f.0 = f32[4]{0} parameter(0)
  %f.1 = f32[4]{0} parameter(1)
  %twice = f32[4]{0} add(%f.0, %f.0), metadata={op_name="jit(g)/table/add"}
  ROOT %both = (f32[4]{0}, f32[4]{0}) tuple(%twice, %f.1)
}

%body (p: (f32[4], f32[4], f32[4])) -> (f32[4], f32[4], f32[4]) {
  %p = (f32[4]{0}, f32[4]{0}, f32[4]{0}) parameter(0)
  %late = f32[4]{0} get-tuple-element(%p), index=0
  %early = f32[4]{0} get-tuple-element(%p), index=1
  %mixed = f32[4]{0} get-tuple-element(%p), index=2
  %sum = f32[4]{0} add(%mixed, %early)
  ROOT %next = (f32[4]{0}, f32[4]{0}, f32[4]{0}) tuple(%late, %early, %sum)
}

%condition (q: (f32[4], f32[4], f32[4])) -> pred[] {
  %q = (f32[4]{0}, f32[4]{0}, f32[4]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: f32[4], b: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %device = u32[] partition-id()
  %where = f32[4]{0} broadcast(%device), dimensions={}
  %moved = f32[4]{0} add(%b, %where)
  %pair = (f32[4]{0}, f32[4]{0}) fusion(%a, %moved), kind=kLoop, calls=%fused
  %first = f32[4]{0} get-tuple-element(%pair), index=0
  %second = f32[4]{0} get-tuple-element(%pair), index=1
  %start = (f32[4]{0}, f32[4]{0}, f32[4]{0}) tuple(%first, %second, %a)
  %loop = (f32[4]{0}, f32[4]{0}, f32[4]{0}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[4]{0} get-tuple-element(%loop), index=0
}
"""


def test_asynchronous_pairs_count_once_with_their_loops():
    sent = Program(ASYNC).sent()
    assert [(s.collective, s.loops) for s in sent] == [
        (Collective("all-to-all", 2 * 8 * 2, 4), ()),
        (Collective("collective-permute", 16, 3), (None,)),
        (Collective("all-gather", 128, 8), (None, 30)),
    ]


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("mesh['data'=1,'seq'=2,'heads'=4] {'seq','heads'}", 8),
    ],
)
def test_groups(groups, size):
    line = f"  ROOT %r = f32[8] all-reduce(%x), replica_groups={groups}, to_apply=%add\n"
    text = "%add (a: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}\n\n"
    text += "ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8] parameter(0)\n" + line + "}\n"
    assert [s.collective for s in Program(text).sent()] == [Collective("all-reduce", 32, size)]


def _names(instructions):
    return {instruction.name for instruction in instructions}


def test_sources_tell_the_elements_of_a_loop_apart():
    program = Program(FLOW)
    main, body = program.computations["main"], program.computations["body"]
    assert _names(program.sources(main["second"])) >= {"b", "device", "moved", "f.1"}
    assert not _names(program.sources(main["second"])) & {"a", "twice"}
    assert "twice" in _names(program.sources(main["result"]))
    assert not _names(program.sources(main["result"])) & {"b", "device"}
    assert {"a", "b", "device"} <= _names(program.sources(body["sum"]))
    assert not _names(program.sources(body["sum"])) & {"twice"}
    assert _names(program.sources(body["sum"], within="body")) == {"mixed", "early", "p"}


def test_scopes_reach_into_fusions():
    found = [(i.name, i.computation) for i, _ in Program(FLOW).walk() if "/table/" in i.scope]
    assert found == [("twice", "fused")]


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("module @jit_f {}")
