"""The plan past one machine: formulas equal to counts on the models, volumes of collectives, and the committed card."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from eval import scaling, scaling_card, scaling_cluster, scaling_counts, scaling_figures, scaling_model
from eval.scaling_checks import best_seconds, small_config
from eval.scaling_cluster import BEST, H200, WORST, Assumption, Strategy, memory, ring_seconds
from eval.scaling_counts import Count, Pass
from eval.scaling_model import Batch, flops, parameters, peak_bytes, saved_bytes
from leviathan import LeviathanConfig

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "model_cards"
PRECISIONS = ("float32", "autocast", "bfloat16")
IDEAL = Assumption(products=1, bandwidth=1, link=1, launch_seconds=0, hop_seconds=0, overlaps=False)


def tiny(**sizes):
    given = {"vocab_size": 521, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2, "head_dim": 12}
    return small_config(**given | {"loss_chunk_size": 16} | sizes)


CAUSAL, PREFIX = Batch(2, 26, 40), Batch(2, 26, 40, prefix=13)
VARIANTS = {
    "grouped keys": tiny(),
    "all keys": tiny(num_key_value_heads=4),
    "four digits": tiny(embedding_base=5, embedding_num_digits=4, embedding_rank=3),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_parameters_equal_those_of_the_model(config):
    assert parameters(config) == scaling_counts.count_parameters(config)


@pytest.mark.parametrize("batch", [CAUSAL, PREFIX], ids=["causal", "prefix"])
def test_flops_equal_those_that_the_counter_counts(batch):
    config = tiny()
    generator = scaling_counts.count_generator(config, batch.distinct_ids)
    backbone = scaling_counts.count_backbone(config, batch, "autocast")
    for fused in (True, False):
        head = scaling_counts.count_head(config, batch.num_labels, "autocast", fused=fused)
        for direction in ("forward", "backward"):
            found = flops(config, batch, direction, fused=fused)
            assert getattr(generator, direction).flops == found.embedding
            assert getattr(head, direction).flops == found.head
            assert getattr(backbone, direction).flops == found.layers + found.attention
    both = [flops(config, batch, direction, fused=True).total for direction in ("forward", "backward")]
    assert flops(config, batch, fused=True).total == sum(both)


def test_a_whole_step_counted_at_once_has_the_flops_of_the_formula():
    config = tiny()
    model, inputs = scaling_counts.small_model(config, PREFIX, "float32")
    with scaling_counts.Counter() as counter:
        model(**inputs).loss.backward()
    assert counter.count.flops == flops(config, PREFIX, fused=True).total


def test_a_head_of_one_chunk_computes_its_logits_once():
    config = tiny(loss_chunk_size=64)
    assert flops(config, CAUSAL, fused=False).head == flops(config, CAUSAL, fused=True).head
    head = scaling_counts.count_head(config, CAUSAL.num_labels, "float32", fused=False)
    assert head.total.flops == flops(config, CAUSAL, fused=False).head


def test_attention_is_counted_as_pytorch_counts_it_on_gpus():
    shape = (2, 4, 26, 12)
    assert scaling_counts._attention(shape, shape, shape) == sdpa_flop_count(shape, shape, shape)
    expected = sdpa_backward_flop_count(shape, shape, shape, shape)
    assert scaling_counts._attention_backward(shape, shape, shape, shape) == expected


def test_the_generator_works_in_proportion_to_its_ids():
    config = tiny()
    few, many = (scaling_counts.count_generator(config, count).total.flops for count in (4, 36))
    assert many == 9 * few


def test_work_of_any_depth_follows_from_one_and_two_layers():
    fitted = scaling_counts.fit_backbone(tiny(), 26, "autocast", prefix=13)
    deep = tiny(num_hidden_layers=5)
    assert fitted.total(5, 3) == scaling_counts.count_backbone(deep, Batch(3, 26, 1, prefix=13), "autocast")
    assert fitted.layers(5, 3) + fitted.fixed + 3 * fitted.row == fitted.total(5, 3)


def test_views_move_nothing_and_a_gather_what_it_takes():
    table, rows = torch.ones(100, 8), torch.tensor([1, 2])
    with scaling_counts.Counter() as counter:
        table.t().unsqueeze(0)
    assert counter.count == Count()
    with scaling_counts.Counter() as counter:
        torch.nn.functional.embedding(rows, table)
    assert counter.count == Count(0, 2 * 2 * 8 * 4, 1)
    with scaling_counts.Counter() as counter:
        table + table
    assert counter.count == Count(0, 3 * 3200, 1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [CAUSAL, PREFIX], ids=["causal", "prefix"])
def test_saved_bytes_equal_those_that_autograd_keeps(precision, batch):
    for config in (tiny(), tiny(num_key_value_heads=4, num_hidden_layers=1)):
        assert saved_bytes(config, batch, precision).total == scaling_counts.measure_saved_bytes(
            config, batch, precision
        )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_within_five_percent(precision, checkpointing):
    config, batch = tiny(hidden_size=96, intermediate_size=256, num_hidden_layers=3), CAUSAL
    counted = scaling_counts.measure_peak_bytes(config, batch, precision, checkpointing=checkpointing)
    assert peak_bytes(config, batch, precision, checkpointing=checkpointing) == pytest.approx(counted, rel=0.05)


def test_checkpointing_keeps_a_layer_s_input():
    saved = saved_bytes(tiny(), CAUSAL, "float32")
    assert saved.total - saved.checkpointed == saved.num_layers * (saved.of_layer - CAUSAL.num_tokens * 48 * 4)


@pytest.mark.parametrize(
    "change",
    [
        {"embedding_type": "lookup"},
        {"output_head": "digits"},
        {"tie_word_embeddings": True},
        {"loss_chunk_size": None},
        {"embedding_token_rank": 2},
    ],
)
def test_a_model_that_the_formulas_do_not_cover_is_refused(change):
    name = next(iter(change))
    with pytest.raises(ValueError, match=name):
        scaling_model.check_covered(tiny(**change))


def test_wrong_batches_and_precisions_are_refused():
    for wrong in ((0, 8, 1, 0), (1, 8, 9, 0), (1, 8, 1, 8), (1, 8, 0, 0)):
        with pytest.raises(ValueError, match="expected rows of more tokens"):
            Batch(*wrong)
    with pytest.raises(ValueError, match="float16"):
        saved_bytes(tiny(), CAUSAL, "float16")
    with pytest.raises(ValueError, match="distinct ids of 521"):
        scaling_counts.small_model(tiny(), Batch(30, 26, 600), "float32")


def work_of(config, batch, strategy):
    count = Count(1e9, 1e6, 10)
    one = Pass(count, 2 * count)
    return scaling_cluster.Work(3 * one, one, one, Pass(Count(flops=1e6), Count(flops=2e6)))


def sent(strategy, num_devices, accumulation=1, config=None):
    """Bytes that a device sends in a step, over links of a byte a second."""
    device = dataclasses.replace(H200, link=1.0, network=math.inf, host=math.inf)
    given = (config or tiny(), CAUSAL, strategy, num_devices, accumulation, device, IDEAL)
    hidden, exposed, _ = scaling_cluster.communication_seconds(*given)
    return hidden + exposed


def test_bytes_sent_are_those_of_rings():
    count, head = parameters(tiny()).total, parameters(tiny()).head
    for num_devices in (2, 8, 16):
        share = (num_devices - 1) / num_devices
        assert sent(Strategy("ddp"), num_devices, 4) == pytest.approx(share * 2 * 4 * count)
        assert sent(Strategy("zero1"), num_devices, 4) == pytest.approx(share * 2 * 2 * count)
        assert sent(Strategy("zero2"), num_devices, 4) == pytest.approx(share * (4 + 1) * 2 * count)
        # All that was gathered stays for backward: ZeRO-3's small models, and FSDP2's head.
        assert sent(Strategy("zero3"), num_devices, 4) == pytest.approx(share * 4 * 2 * 2 * count)
        assert sent(Strategy("fsdp2"), num_devices, 4) == pytest.approx(share * 2 * (4 * (2 * count - head) + count))
    assert all(sent(Strategy(kind), 1) == 0 for kind in scaling_cluster.SHARDINGS)


def test_zero3_keeps_the_last_layers():
    assert [scaling_cluster.live_parameters(count) for count in (1e8, 5e8, 2e9)] == [1e8, 5e8, 5e8]


def test_tensor_parallelism_sums_four_times_a_layer_and_gathers_logits():
    config = tiny()
    tokens = CAUSAL.num_tokens * 48
    logits = CAUSAL.num_labels * (2 * 521 + 2 * 48)  # of several chunks
    inside = 0.5 * 2 * (2 * 4 * 2 * tokens + logits)
    assert sent(Strategy("ddp", 2), 2, config=config) == pytest.approx(inside)
    again = 0.5 * 2 * (2 * 6 * 2 * tokens + logits)
    assert sent(Strategy("ddp", 2, checkpointing=True), 2, config=config) == pytest.approx(again)


def test_rings_leave_a_node_over_all_its_ports():
    assert ring_seconds(8e9, 8, False, H200, IDEAL) == pytest.approx(7 / 8 * 8e9 / 450e9)
    assert ring_seconds(8e9, 16, True, H200, IDEAL) == pytest.approx(15 / 16 * 8e9 / 400e9)
    assert ring_seconds(8e9, 1, False, H200, IDEAL) == 0


def test_memory_is_sharded_as_each_strategy_says():
    config = tiny()
    count = parameters(config).total

    def states(kind, num_devices):
        held = memory(config, CAUSAL, Strategy(kind), num_devices, 1)
        return held.weights + held.gradients + held.optimizer

    assert states("ddp", 1) == states("ddp", 64) == 16 * count == scaling_model.state_bytes(count, "autocast")
    assert states("fsdp2", 64) == pytest.approx(16 * count / 64)
    assert states("zero1", 64) == pytest.approx(count * (4 + 16 / 64))
    assert states("zero2", 64) == pytest.approx(count * (2 + 18 / 64))
    assert states("zero3", 64) == pytest.approx(count * 20 / 64)
    offloaded = memory(config, CAUSAL, Strategy("zero3_offload"), 64, 1)
    assert offloaded.host == pytest.approx(count * 18 / 64)
    assert offloaded.optimizer == offloaded.weights == 0
    halves = memory(config, CAUSAL, Strategy("ddp", 2), 2, 1)
    body = 2 * scaling_model.layer_weights(config) + parameters(config).head
    assert halves.weights == 4 * (count - body / 2)
    assert halves.communication == 0 < memory(config, CAUSAL, Strategy("ddp"), 2, 1).communication
    assert halves.total == sum(value for name, value in vars(halves).items() if name != "host")


def test_a_step_hides_communication_only_in_the_best_case():
    config = tiny()
    for strategy in scaling.strategies():
        if strategy.tensor_parallel > 2:
            continue
        given = (config, CAUSAL, work_of(config, CAUSAL, strategy), strategy, 16, 2, H200)
        hidden = scaling_cluster.step_seconds(*given, dataclasses.replace(WORST, overlaps=True))
        added = scaling_cluster.step_seconds(*given, WORST)
        alone = added.forward + added.backward + added.optimizer
        assert added.total == pytest.approx(alone + added.communication)
        assert alone <= hidden.total <= added.total
        assert scaling_cluster.step_seconds(*given, BEST).total < added.total


def step_of(strategy, num_devices, assumption=IDEAL, device=H200):
    config = tiny()
    given = (config, CAUSAL, work_of(config, CAUSAL, strategy), strategy, num_devices, 2, device, assumption)
    return scaling_cluster.step_seconds(*given)


def test_a_step_is_the_sum_of_its_parts():
    # See work_of: three of layers, of ends and head one each.
    part = 1e9 / H200.half_flops + 1e6 / H200.bytes_per_second
    generator = 1e6 / H200.float_flops
    for checkpointing in (False, True):  # computes layers again, and they alone
        step = step_of(Strategy("ddp", checkpointing=checkpointing), 1)
        assert step.forward == pytest.approx(2 * (5 * part + generator))
        assert step.backward == pytest.approx(2 * ((10 + 3 * checkpointing) * part + 2 * generator))
        assert step.total == pytest.approx(step.forward + step.backward + step.optimizer)


def test_the_optimizer_moves_a_share_of_forty_bytes_a_parameter():
    moved = 40 * parameters(tiny()).total
    assert step_of(Strategy("ddp"), 8).optimizer == pytest.approx(moved / H200.bytes_per_second)
    assert step_of(Strategy("fsdp2"), 8).optimizer == pytest.approx(moved / 8 / H200.bytes_per_second)
    assert step_of(Strategy("zero3_offload"), 8).optimizer == pytest.approx(moved / 8 / H200.host_bytes_per_second)


@pytest.mark.parametrize(
    ("kind", "collectives"), [("ddp", 1), ("zero1", 4), ("zero2", 7), ("zero3", 18), ("fsdp2", 15)]
)
def test_collectives_wait_for_the_logarithm_of_their_members(kind, collectives):
    late = dataclasses.replace(IDEAL, hop_seconds=1.0)
    waits = step_of(Strategy(kind), 8, late).communication - step_of(Strategy(kind), 8).communication
    assert waits == pytest.approx(3 * collectives)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_of_ddp_hide_behind_the_last_backward_pass_and_shards_behind_all(kind):
    slow = dataclasses.replace(H200, link=1e6)
    step = step_of(Strategy(kind), 8, dataclasses.replace(IDEAL, overlaps=True), slow)
    behind = step.backward / 2 if kind == "ddp" else step.forward + step.backward
    assert step.communication > behind
    assert step.total == pytest.approx(step.forward + step.backward + step.optimizer + step.communication - behind)


def test_an_asynchronous_device_waits_for_the_longer_of_launching_and_computing():
    count = Count(flops=H200.half_flops, bytes=2 * H200.bytes_per_second, launches=1)
    assert scaling_cluster.pass_seconds(count, 0, H200, IDEAL, "autocast") == pytest.approx(3)
    late = dataclasses.replace(IDEAL, launch_seconds=5)
    assert scaling_cluster.pass_seconds(count, 0, H200, late, "autocast") == pytest.approx(5)
    cpu = dataclasses.replace(H200, is_asynchronous=False)
    assert scaling_cluster.pass_seconds(count, H200.float_flops, cpu, late, "autocast") == pytest.approx(9)


def test_tensor_parallelism_divides_products():
    config, work = tiny(), work_of(None, None, None)
    half = scaling_cluster.divided(work, config, CAUSAL, "autocast", 2)
    assert half.layers.total.flops == work.layers.total.flops / 2
    assert work.layers.total.bytes / 2 < half.layers.total.bytes < work.layers.total.bytes
    assert half.head.total == dataclasses.replace(work.head.total, flops=work.head.total.flops / 2)
    assert scaling_cluster.divided(work, config, CAUSAL, "autocast", 1) is work


RUN = scaling.Run(tiny(), tokens=26, prefix=0, rows=4, sequences=16, steps=10)


@pytest.fixture(scope="module")
def work():
    return scaling.Counted(RUN)


@pytest.fixture(scope="module")
def small_plans(work):
    plans = [scaling.plan(RUN, work, each, H200, (1, 4, 64)) for each in scaling.strategies()]
    return {(plan["strategy"], plan["checkpointing"]): plan for plan in plans}


def test_plans_keep_the_sequences_of_a_step(small_plans):
    for plan in small_plans.values():
        split = int(plan["strategy"][2:]) if plan["strategy"].startswith("tp") else 1
        for count, rows, accumulation in zip(plan["devices"], plan["rows"], plan["accumulation"], strict=True):
            assert count // split * rows * accumulation == RUN.sequences
        assert all(best < worst for best, worst in zip(plan["seconds_best"], plan["seconds_worst"], strict=True))
        assert len({len(column) for column in plan.values() if isinstance(column, list)}) == 1


def test_what_cannot_be_planned_is_said(small_plans):
    assert small_plans["ddp", False]["left_out"] == {"64 copies are more than the 16 sequences of a step": [64]}
    heads = "num_key_value_heads = 2 is no multiple of 4"
    assert small_plans["tp4", False]["left_out"][heads] == [4, 64]
    odd = "vocab_size = 521 is no multiple of 2"
    assert odd in small_plans["tp2", False]["left_out"]


def test_counts_of_a_run_are_equal_to_the_formulas(work):
    found = scaling.counted(RUN, work)
    assert found["is_equal"]
    assert found["extrapolation_is_equal"]
    assert found["flops_counted"] == round(flops(RUN.config, RUN.batch(4), fused=True).total)


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    device = dataclasses.replace(H200, memory_bytes=1e9)
    limit = scaling_cluster.USABLE * device.memory_bytes
    rows = scaling.largest_rows(RUN, Strategy("ddp"), 8, device)
    held = [memory(RUN.config, RUN.batch(count), Strategy("ddp"), 8, 1).total for count in (rows, 2 * rows)]
    assert held[0] <= limit < held[1]
    assert scaling.largest_rows(RUN, Strategy("ddp"), 8, dataclasses.replace(H200, memory_bytes=1e3)) == 0


def test_runs_are_read_from_the_published_configs():
    run = scaling.read_run(scaling.CONFIGS / "pile_60m.yaml")
    assert (run.tokens, run.prefix, run.rows, run.sequences, run.steps) == (512, 0, 64, 512, 4600)
    assert run.tokens_of_step == 512 * 512
    assert parameters(run.config) == scaling_counts.count_parameters(run.config)
    fields = scaling.read_run(scaling.CONFIGS / "turbulence_64.yaml")
    assert (fields.tokens, fields.prefix, fields.rows, fields.sequences) == (8192, 4096, 4, 32)
    assert [fields.batch(rows).distinct_ids for rows in (4, 8, 16)] == [32_768, 65_536, fields.config.vocab_size]
    assert fields.batch(1).num_labels == 4096
    assert fields.batch(1).num_pairs == 4096**2 + 4096 * 8192


def test_the_time_of_a_thread_is_measured():
    assert 0 < best_seconds(lambda: torch.ones(256, 256) @ torch.ones(256, 256)) < 1


@pytest.fixture(scope="module")
def record():
    return json.loads((CARDS / "scaling" / scaling.RECORD).read_text(encoding="utf-8"))


def test_the_committed_card_is_what_its_record_generates(record):
    assert (CARDS / "scaling.md").read_text(encoding="utf-8") == scaling_card.scaling_card(record, "scaling")
    assert (CARDS / "scaling" / scaling_figures.PICTURE).exists()


def test_the_record_is_what_the_formulas_say_today(record):
    assert list(record["sizes"]) == list(scaling.SIZES)
    for name, size in record["sizes"].items():
        run = scaling.read_run(scaling.CONFIGS / f"{scaling.SIZES[name]}.yaml")
        assert size["counted"]["parameters"]["total"] == parameters(run.config).total
        assert size["counted"]["flops_counted"] == flops(run.config, run.batch(run.rows), fused=True).total
        for plan in size["plans"]:
            strategy = next(
                each
                for each in scaling.strategies()
                if (each.name, each.checkpointing) == (plan["strategy"], plan["checkpointing"])
            )
            for i, count in enumerate(plan["devices"]):
                held = memory(run.config, run.batch(plan["rows"][i]), strategy, count, plan["accumulation"][i])
                assert plan["bytes"][i] == pytest.approx(held.total, rel=1e-5)
    assert record["device"] == scaling.rounded(dataclasses.asdict(H200))
    assert record["assumptions"] == {"best": vars(BEST), "worst": vars(WORST), "usable": scaling_cluster.USABLE}


def test_the_card_says_what_its_record_says(record):
    text = scaling_card.scaling_card(record, "scaling")
    assert "No point was measured on an H200" in text
    other = copy.deepcopy(record)
    other["sizes"]["60M"]["counted"]["is_equal"] = False
    other["checks"]["saved"][0]["formula"] += 1
    other["sizes"]["1B"]["plans"][0]["fits"][0] = False
    other["sizes"]["1B"]["plans"][0]["bytes"][0] = 2e11
    changed = scaling_card.scaling_card(other, "scaling")
    assert "**Counted parameters or FLOPs of 60M differ" in changed
    assert "8 of 9 equal to the byte" in changed
    assert "200.0 GB **too much**" in changed
    assert (
        "On one GPU without sharding fit: 60M, 109M, 420M, turbulence; the largest takes 200 of 141 GB (1B)" in changed
    )


def test_times_are_written_in_units_that_fit():
    assert [scaling_card._time(seconds) for seconds in (30, 90, 5400, 129_600)] == ["30 s", "1.5 min", "1.5 h", "1.5 d"]
    assert [scaling_card._percent(0.1, high) for high in (0.101, 0.2)] == ["10%", "10 to 20%"]
    assert scaling_card._tokens(4e5, 8e5) == "400 to 800 k/s"
    assert scaling_card._tokens(4e5, 1.2e6) == "0.4 to 1.2 M/s"


def test_the_picture_draws_every_strategy_that_there_is(record):
    figure = Figure()
    scaling_figures.draw_plans(figure, record)
    left, right = figure.axes[:2]
    assert len(left.lines) == len(scaling_figures.DRAWN)
    assert len(right.collections) == len(scaling_figures.BANDS)


def test_words_alone_need_no_counting(record, tmp_path, capsys):
    (tmp_path / "scaling").mkdir()
    (tmp_path / "scaling" / scaling.RECORD).write_text(json.dumps(record), encoding="utf-8")
    scaling.main(["--out", str(tmp_path / "scaling"), "--card", str(tmp_path / "scaling.md"), "--words-only"])
    assert (tmp_path / "scaling.md").read_text(encoding="utf-8") == (CARDS / "scaling.md").read_text(encoding="utf-8")
    assert "wrote" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error"):
        scaling.main(["--out", str(tmp_path / "nowhere"), "--words-only"])


def test_records_keep_six_digits():
    assert scaling.rounded({1: (1.23456789, 2.0, 7, "a", True)}) == {"1": [1.23457, 2, 7, "a", True]}


def test_checking_needs_layers_of_one_kind():
    config = LeviathanConfig(vocab_size=521, hidden_size=48, num_attention_heads=4, intermediate_size=64)
    with pytest.raises(ValueError, match="loss_chunk_size"):
        scaling_model.check_covered(config)
