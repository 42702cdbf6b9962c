"""The plan: collectives of known programs, memory as the compiler says it, and what is refused."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from graftax import InputError
from graftax.model import Config
from graftax.model.sharding import AXES, make_mesh
from graftax.peft import LoRA, Subset
from graftax.train import cli
from graftax.train.config import Data, Run
from graftax.train.plan import hlo, jaxpr_memory, planner, roofline, trace
from graftax.train.plan.command import Plan
from graftax.train.plan.planner import make_plan, parse_out_of_memory
from graftax.train.plan.search import meshes
from graftax.train.plan.topology import libtpu, parse_topology
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

MODEL = Config(V=64, D=32, L=3, N=4, K=2, H=8, F=48, context=64)
RUN = Run(phase="pretrain", model=MODEL, method=Subset("all"), data=Data(T=32, batch=8), mesh=(2, 2, 2))
MESH = AbstractMesh((2, 2, 4, 1), AXES)

TEXT = """HloModule step, entry_computation_layout={()->f32[]}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %ag = f32[32,4]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, replica_groups=[4,4]<=[16], dimensions={0}
  %fused = f32[8,4]{1,0} fusion(%ag), kind=kLoop, calls=%again
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %fused)
}

%again (q: f32[8,4]) -> f32[8,4] {
  %q = f32[8,4]{1,0} parameter(0)
  %ag.2 = f32[32,4]{1,0} all-gather(%q), channel_id=1, replica_groups=[4,4]<=[16], dimensions={0}
  %step = f32[64,4]{1,0} all-gather(%q), channel_id=9, replica_groups=[4,4]<=[16], dimensions={0}
  ROOT %r = f32[8,4]{1,0} slice(%ag.2)
}

%begin (q: f32[16,4]) -> (f32[16,4], f32[64,4]) {
  %ag.9 = f32[64,4]{1,0} all-gather(%q), channel_id=9, replica_groups=[4,4]<=[16], dimensions={0}
  ROOT %cc = (f32[16,4]{1,0}, f32[64,4]{1,0}) custom-call(%ag.9), custom_call_target="AsyncCollectiveStart"
}

%cond (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]) parameter(0)
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8,4]) -> f32[] {
  %a = f32[8,4]{1,0} parameter(0)
  %start = (f32[16,4]{1,0}, f32[64,4]{1,0}) fusion(%a), kind=kCustom, calls=%begin
  %w = (s32[], f32[8,4]) while(%t0), condition=%cond, body=%body
  %w2 = (s32[], f32[8,4]) while(%t0), condition=%cond2, body=%body2, backend_config={"known_trip_count":{"n":"7"}}
  %ar = (bf16[16,4]{1,0}, f32[2]{0}) all-reduce-start(%b, %c), channel_id=2, replica_groups=[4,4]<=[2,2,4]T(2,1,0)
  %ar.1 = (bf16[16,4]{1,0}, f32[2]{0}) all-reduce-done(%ar)
  %gs = (s8[4,4]{1,0}, s8[8,4]{1,0}) all-gather-start(%d), channel_id=3, replica_groups={{0,4},{1,5},{2,6},{3,7}}
  %rs = f32[2,4]{1,0} reduce-scatter(%a), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %cp = f32[8,4]{1,0} collective-permute(%a), channel_id=5, source_target_pairs={{0,8},{8,0},{1,9},{9,1}}
  %none = f32[8,4]{1,0} all-reduce(%a), channel_id=6, replica_groups={{0},{1},{2},{3}}, to_apply=%add
}

%body2 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %all = f32[8,4]{1,0} all-reduce(%x), channel_id=7, replica_groups={}, to_apply=%add
}
"""


def test_collectives_of_a_text():
    several = hlo.collectives(TEXT, MESH)
    assert [c.times for c in several if c.nbytes == 1024] == [1]  # begun before the loop whose fusions carry it on
    found = {(c.kind, c.axes): c for c in several if c.nbytes != 1024}
    assert {k: (c.size, c.nbytes, c.times) for k, c in found.items()} == {
        ("all-gather", ("tensor",)): (4, 512, 5),  # once a trip, though two fusions hold it
        ("all-reduce", ("data", "fsdp", "tensor")): (16, 128, 7),
        ("all-reduce", ("data", "fsdp")): (4, 136, 1),
        ("all-gather", ("fsdp",)): (2, 32, 1),
        ("reduce-scatter", ("tensor",)): (4, 128, 1),
        ("collective-permute", ("data",)): (2, 128, 1),
    }
    assert found["all-gather", ("tensor",)].sent == 512 * 3 / 4 * 5
    assert found["all-reduce", ("data", "fsdp")].sent == 2 * 136 * 3 / 4


def test_collectives_of_a_compiled_program():
    mesh = make_mesh((2, 1, 4))

    def step(x, w):
        def body(x, _):
            return jnp.tanh(x @ w), None  # rows over data, D over tensor: a sum over tensor

        return jax.lax.scan(body, x, length=6)[0]

    split = [NamedSharding(mesh, spec) for spec in (P("data", "tensor"), P("tensor", None))]
    shapes = [
        jax.ShapeDtypeStruct(s, jnp.float32, sharding=w) for s, w in zip(((16, 32), (32, 32)), split, strict=True)
    ]
    text = jax.jit(step, out_shardings=split[0]).lower(*shapes).compile().as_text()
    found = [c for c in hlo.collectives(text, mesh) if c.times == 6]
    assert [c.axes for c in found] == [("tensor",)]
    assert sum(c.sent for c in found) in (2 * 1024 * 3 / 4 * 6, 1024 * 3 / 4 * 6)  # all-reduce, or reduce-scatter


def test_replica_groups():
    assert hlo.replica_groups("replica_groups=[2,4]<=[4,2]T(1,0)", 8).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert hlo.replica_groups("replica_groups={{0,1},{2,3}}", 4).tolist() == [[0, 1], [2, 3]]
    assert hlo.replica_groups("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", 4).tolist() == [[0, 2], [1, 3]]
    assert hlo.replica_groups("replica_groups={}", 3).tolist() == [[0, 1, 2]]


def test_a_trace_counts_products_of_loops_and_what_lives():
    def step(x, w):
        y, kept = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x @ w), x, w)
        return y.sum() + kept.sum()

    closed = jax.make_jaxpr(step)(jnp.ones((8, 16)), jnp.ones((5, 16, 16)))
    got = trace.trace_cost(closed, trace.DeviceSizes())
    assert got.flops == 2 * 5 * 2 * 8 * 16 * 16
    stacked, carry, weight = 5 * 8 * 16 * 4, 8 * 16 * 4, 16 * 16 * 4
    assert stacked + carry + weight <= got.peak <= stacked + 3 * carry + weight
    assert stacked <= got.activations <= got.peak


def test_products_hide_memory_traffic_but_not_collectives():
    times = roofline.Times(compute=2.0, memory=3.0, links=0.5)
    assert (times.expected, times.best) == (3.5, 3.0)


def test_a_scan_says_what_it_carries():
    """In the words of jax 0.10, and in those of 0.12: trees of what goes in."""
    trees = SimpleNamespace(unpack=lambda: (("c",), ("x", "y"), ("row",)))
    assert (
        jaxpr_memory.scan_arity({"num_consts": 1, "num_carry": 2})
        == jaxpr_memory.scan_arity({"ft_in": trees})
        == (1, 2)
    )
    inner = lambda x, w: (x + w, None)  # noqa: E731
    (scan,) = jax.make_jaxpr(lambda x, w: jax.lax.scan(inner, x, w))(jnp.ones(3), jnp.ones((5, 3))).eqns
    assert jaxpr_memory.scan_arity(scan.params) == (0, 1)


@pytest.mark.parametrize("method", [Subset("all"), LoRA()], ids=["full", "lora"])
def test_a_plan_says_what_the_compiled_step_of_a_run_says(method):
    run, here = dataclasses.replace(RUN, method=method), parse_topology("cpu:8")
    row = make_plan(run, here)
    guess = make_plan(run, here, compiling=False)
    assert (row["source"], guess["source"]) == ("compiled", "model")
    assert row["arguments"] + row["temporaries"] == pytest.approx(row["bytes"]["total"], rel=0.02)
    exact = sum(row["bytes"][k] for k in ("weights", "trainable", "optimizer"))
    assert exact == pytest.approx(row["arguments"], rel=0.05)  # the batch aside
    assert guess["bytes"]["total"] == pytest.approx(row["bytes"]["total"], rel=0.5)  # tiny arrays: not its field
    assert row["trainable"] == sum(x.size for x in jax.tree.leaves(jax.eval_shape(
        method.init, jax.random.key(0), planner.shapes_of(MODEL))))  # fmt: skip
    assert set(row["sent"]) & {"fsdp", "tensor", "data+fsdp"}


def test_without_a_compiler_there_is_a_model_that_says_so():
    row = make_plan(dataclasses.replace(RUN, mesh=(1, -1, 1)), parse_topology("gpu:h200x8"))
    assert row["source"] == "model"
    assert "no compiler" in row["compiler"]
    assert row["fits"]
    assert row["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1, "context": 1}
    narrow = make_plan(dataclasses.replace(RUN, mesh=(1, 2, 2, 2)), parse_topology("gpu:h200x8"))
    assert narrow["sent"]["context"]["all-gather"] > 0


@pytest.mark.skipif(not libtpu(), reason="libtpu is not installed")
def test_a_tpu_slice_is_compiled_for_ahead_of_time():
    row = make_plan(dataclasses.replace(RUN, mesh=(1, 4, 1)), parse_topology("v5e:2x2"))
    assert row["source"] == "compiled"
    assert row["chip"] == "TPU v5e"
    assert row["fits"]


def test_a_program_that_is_too_large_says_by_how_much():
    said = "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    assert parse_out_of_memory(said) == (20.5 * 2**30, 15.75 * 2**30)
    assert parse_out_of_memory("required for HLO temporaries (335.31G) exceeds available HBM (15.75G)") == (
        335.31 * 2**30, 15.75 * 2**30)  # fmt: skip
    assert parse_out_of_memory("something else") is None
    huge = dataclasses.replace(MODEL, D=16384, F=65536, N=128, K=128, H=128, L=64)
    row = make_plan(dataclasses.replace(RUN, model=huge, mesh=(8, 1, 1)), parse_topology("gpu:h100x8"))
    assert not row["fits"]
    assert row["left"] < -(2**40)


def plan(*args: str):
    return Plan.from_flags(list(args)).run()


def test_the_command(capsys):
    row = plan("sft", "--base", "tiny", "--method", "lora", "--data.T", "32", "--topology", "cpu:8", "--model")
    assert row["method"] == "lora"
    assert row["source"] == "model"
    table = plan("sft", "--base", "tiny", "--data.T", "32", "--topology", "gpu:h200x8", "--methods", "full,lora,prefix")
    assert table["full"]["trainable"] > table["lora"]["trainable"] > table["prefix"]["trainable"]
    assert table["full"]["bytes"]["total"] > table["lora"]["bytes"]["total"]
    found = plan("sft", "--base", "tiny", "--data.T", "32", "--topology", "gpu:a100x2", "--search")
    assert found
    assert all(r["fits"] for r in found.values())
    cli.main(["plan", "sft", "--base", "tiny", "--data.T", "32", "--topology", "cpu:8", "--model", "--json"])
    assert json.loads(capsys.readouterr().out)["bytes"]["total"] > 0


def test_meshes_use_all_devices():
    found = list(meshes(8, context=True))
    assert (2, 2, 2, 1) in found
    assert all(a * b * c * d == 8 for a, b, c, d in found)


@pytest.mark.parametrize(("args", "message"), [
    (["sft", "--base", "tiny", "--topology", "v5x:2x2"], "--topology 'v5x:2x2'.*did you mean v5"),
    (["sft", "--base", "tiny", "--topology", "gpu:b7x8"], "expected one of"),
    (["sft", "--base", "tiny", "--data.T", "32", "--topology", "cpu:8", "--mesh", "3", "1", "1"], "not match the 8"),
    (["sft", "--base", "tinny", "--topology", "cpu:8"], "did you mean tiny"),
    (["sft", "--topology", "cpu:8"], "give --base"),
    (["sftt"], "needs a recipe, not 'sftt'; did you mean sft"),
    (["sft", "--base", "tiny", "--data.T", "32", "--data.batch", "6", "--topology", "cpu:8"], "batch 6 does not"),
])  # fmt: skip
def test_what_a_plan_refuses(args, message):
    with pytest.raises(InputError, match=message):
        plan(*args)


def test_a_base_without_a_config(tmp_path):
    with pytest.raises(InputError, match="has no config"):
        plan("sft", "--base", str(tmp_path), "--topology", "cpu:8")
