"""Fitting: the search on made-up machines, and once for real with training."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import prepare
from lab.files import unsealed
from lab.machine import fit
from lab.machine.fit import Fitting, Measured, operations, possible, predicted_bpb, speed, token_seconds, with_model
from lab.preset import Batch, from_dict, load, to_dict

PRESET = load("tinystories")
GFLOPS = 100e9


def machine(preset, *, rows_mb=10.0, base_mb=100.0, slow=lambda preset: 1.0):
    """A machine of 100 GFLOP/s whose memory grows with the rows."""
    return Measured(preset, GFLOPS / operations(preset) / slow(preset), base_mb + rows_mb * preset.batch.rows)


def search(memory_mb: float, **traits) -> tuple[Fitting, list]:
    tried = []

    def measure(preset):
        tried.append(preset)
        return machine(preset, **traits)

    return Fitting(memory_mb, measure, lambda line: None), tried


def test_rows_grow_while_that_is_faster_and_never_beyond_the_memory():
    one, tried = search(400, slow=lambda preset: 1 + 64 / preset.batch.rows)
    start = machine(replace(PRESET, batch=replace(PRESET.batch, rows=4)), slow=lambda preset: 17)
    best = one.batch(start, ("bfloat16",))
    assert best.preset.batch.rows == 16  # 32 rows would take 420 MB
    assert all(machine(preset).peak_memory_mb <= 400 for preset in tried)


def test_rows_shrink_where_that_is_faster():
    one, _ = search(1e6, slow=lambda preset: preset.batch.rows)
    best = one.batch(one.measure(PRESET), ("bfloat16",))
    assert best.preset.batch.rows == 1


def test_the_faster_dtype_and_number_of_processes_are_taken():
    one, _ = search(1e6, slow=lambda p: (2 if p.model.dtype == "bfloat16" else 1) / p.batch.processes)
    best = one.processes(one.batch(one.measure(PRESET), ("bfloat16", "float16")), 2)
    assert (best.preset.model.dtype, best.preset.batch.processes) == ("float16", 2)
    assert possible(best.preset)


def test_the_tier_stands_where_nothing_is_clearly_faster():
    one, _ = search(1e6, slow=lambda preset: 0.97 if preset.batch.rows != PRESET.batch.rows else 1.0)
    assert one.processes(one.batch(one.measure(PRESET), ("bfloat16", "float16")), 2).preset == PRESET


def test_a_faster_machine_gets_a_larger_model():
    def size(speed: float) -> int:
        one, _ = search(1e6, slow=lambda preset: 1 / speed)
        best = one.size(one.measure(PRESET))
        assert best.bpb <= one.measure(PRESET).bpb
        assert best.preset.model.width % best.preset.model.head_dim == 0
        return fit.block_parameters(best.preset.model.depth, best.preset.model.width)

    assert size(0.3) < size(100)


def test_what_layers_and_width_cost_is_read_off_the_measured_sizes():
    sizes = [with_model(PRESET, depth=d, width=w) for d, w in ((4, 256), (2, 256), (4, 320))]
    taken = {size: 1e-11 * operations(size) + 2e-5 * size.model.depth for size in sizes}
    cost = token_seconds([Measured(size, 1 / seconds, 100.0) for size, seconds in taken.items()])
    other = with_model(PRESET, depth=8, width=128)
    assert cost(other) == pytest.approx(1e-11 * operations(other) + 2e-5 * 8)
    alone = token_seconds([Measured(PRESET, 1000.0, 100.0)])
    assert alone(other) == pytest.approx(operations(other) / operations(PRESET) / 1000)


def test_a_size_that_could_take_too_much_memory_is_not_even_tried():
    one, tried = search(200, rows_mb=1.0)
    start = one.measure(PRESET)
    one.size(start)
    assert all(operations(p) * start.peak_memory_mb <= 200 * operations(PRESET) for p in tried)


def test_a_candidate_that_fails_or_takes_too_much_is_left_out():
    def measure(preset):
        return None if preset.batch.rows > 64 else machine(preset, rows_mb=1000.0 if preset.batch.rows < 64 else 1.0)

    one = Fitting(10_000, measure, lambda line: None)
    assert one.batch(measure(PRESET), ("bfloat16",)).preset == PRESET


def test_speed_is_the_budgets_average_of_usual_and_doubled_steps():
    def steps(*tokens):
        total, seconds = np.cumsum(tokens), np.cumsum([0.1 if n == 100 else 0.125 for n in tokens])
        return [{"tokens": n, "seconds": s} for n, s in zip(total, seconds, strict=True)]

    batch = Batch(tokens_per_step=100, rows=1, doubling=0.25)
    assert speed(steps(100, 100, 100), batch) == pytest.approx(1000)
    assert speed(steps(200, 200, 200), batch) == pytest.approx(1600)
    assert speed(steps(100, 100, 100, 200, 200), batch) == pytest.approx(0.25 * 1000 + 0.75 * 1600)


def test_the_rule_falls_with_size_and_with_tokens():
    assert predicted_bpb(1e6, 1e6) > predicted_bpb(2e6, 1e6)
    assert predicted_bpb(1e6, 1e6) > predicted_bpb(1e6, 2e6)


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_text("{")])
def test_a_fit_is_cached_and_measured_again_when_damaged_or_requested(prepared, cache, monkeypatch, damage):
    record = json.loads((cache / "current.json").read_text())
    record["preset"]["model"] |= {"depth": 2, "width": 64, "head_dim": 32}
    record["preset"]["batch"] |= {"rows": 2, "tokens_per_step": 1024}
    preset, said = from_dict(record["preset"]), []
    runs, shortly = [], fit.train_shortly

    def count(candidate, folder):
        runs.append(candidate)
        return shortly(candidate, folder) if len(runs) == 1 else None  # one real training; the others fail

    monkeypatch.setattr(fit, "train_shortly", count)
    monkeypatch.setattr(fit.hardware, "matmul_peak", lambda dtype: 1e11)  # other tests run beside this one
    chosen, found = fit.fitted(preset, prepared, None, said.append)
    assert chosen == preset
    assert found["tokens_per_second"] > 0
    assert found["peak_memory_mb"] > 10
    assert any("failed" in line for line in said)
    assert said[-1].startswith("chosen: depth 2, width 64")
    assert "predicted" not in said[-1]  # the rule's numbers hold for TinyStories alone
    assert found["why"] == [line.strip() for line in said]
    first = len(runs)
    assert fit.fitted(preset, prepared, None, said.append) == (chosen, found)
    assert len(runs) == first
    assert fit.fitted(preset, prepared, False, said.append) == (preset, None)
    assert fit.fitted(preset, prepared, True, said.append)[1] is None  # the tier's own settings fail now
    [path] = (cache / "fit").iterdir()
    damage(path)
    runs.clear()
    assert fit.fitted(preset, prepared, None, said.append)[1]["batch"] == found["batch"]
    assert runs


def made_up(monkeypatch, *, flops=1e12, taken=0.0, **facts):
    """Fitting sees a machine of these facts, on which `machine` above trains."""
    facts = fit.hardware.describe() | facts
    monkeypatch.setattr(fit.hardware, "describe", lambda: facts)
    monkeypatch.setattr(fit.hardware, "matmul_peak", lambda dtype: flops)
    monkeypatch.setattr(fit.hardware, "taken", lambda: taken)


def test_it_is_measured_again_once_the_machine_is_faster_than_when_it_was_fitted(prepared, cache, monkeypatch):
    speed, said = [1.0], []
    monkeypatch.setattr(fit, "train_shortly", lambda preset, _: machine(preset, slow=lambda preset: 1 / speed[0]))
    made_up(monkeypatch, flops=1e11, taken=0.45, backend="cpu", cpu_cores=2)
    _, busy = fit.fitted(PRESET, prepared, None, said.append)
    assert "other programs use 45 % of the CPU" in said[1]
    made_up(monkeypatch, flops=1.2e11)
    assert fit.fitted(PRESET, prepared, None, said.append)[1] == busy
    said.clear()
    speed[0] = 1.6
    made_up(monkeypatch, flops=1.6e11)
    free = fit.fitted(PRESET, prepared, None, said.append)[1]
    assert said[0] == "this machine is 1.6 times as fast as when it was fitted; measuring again"
    assert not any("other programs" in line for line in said)
    assert free["predicted_bpb"] < busy["predicted_bpb"]
    made_up(monkeypatch, flops=0.5e11)  # busy now: what was measured stands
    assert fit.fitted(PRESET, prepared, None, said.append)[1] == free


def test_a_machine_that_became_busy_meanwhile_is_measured_again(prepared, cache, monkeypatch):
    made_up(monkeypatch, flops=1e11)

    def slower(preset, _):
        made_up(monkeypatch, flops=0.5e11)
        return machine(preset)

    monkeypatch.setattr(fit, "train_shortly", slower)
    fit.fitted(PRESET, prepared, None, lambda line: None)
    made_up(monkeypatch, flops=1e11)
    said = []
    fit.fitted(PRESET, prepared, None, said.append)
    assert said[0].startswith("this machine is 2.0 times as fast")


def test_sizes_are_measured_with_the_processes_that_will_train_them(prepared, cache, monkeypatch):
    tried = []

    def measure(preset, _):
        tried.append(preset)
        return machine(preset, slow=lambda preset: 8 / preset.batch.processes)

    monkeypatch.setattr(fit, "train_shortly", measure)
    made_up(monkeypatch, backend="cpu", cpu_cores=2)
    chosen, _ = fit.fitted(PRESET, prepared, None, lambda line: None)
    assert chosen.batch.processes == 2
    sizes = {(preset.model.depth, preset.model.width): preset.batch.processes for preset in tried[2:]}
    assert all(tried[0].batch.rows == preset.batch.rows * preset.batch.processes for preset in tried[-4:])
    del sizes[chosen.model.depth, chosen.model.width]  # with one process too, at last
    assert set(sizes.values()) == {2}


def test_in_a_small_container_one_process_trains_in_half_of_its_memory(prepared, cache, monkeypatch):
    tried, said = [], []

    def measure(preset, _):
        tried.append(preset)
        return machine(preset, slow=lambda preset: 1 + 64 / preset.batch.rows)

    monkeypatch.setattr(fit, "train_shortly", measure)
    made_up(monkeypatch, backend="cpu", cpu_cores=1, memory_gb=0.5)
    preset = replace(PRESET, batch=replace(PRESET.batch, rows=4, processes=1))
    fit.fitted(preset, prepared, None, said.append)
    assert said[0].endswith("memory limit 256 MB")
    assert {candidate.batch.processes for candidate in tried} == {1}
    assert any("8 rows a pass: skipped, could take 280 MB" in line for line in said)


def test_float16_is_measured_and_never_chosen(prepared, cache, monkeypatch):
    made_up(monkeypatch, backend="metal")
    seconds = {"float16": 1.0, "bfloat16": 2.0, "float32": 4.0}
    monkeypatch.setattr(fit, "train_shortly", lambda p, _: machine(p, slow=lambda p: seconds[p.model.dtype]))
    said = []
    chosen, _ = fit.fitted(with_model(load("tinystories"), dtype="float32"), prepared, None, said.append)
    assert chosen.model.dtype == "bfloat16"
    assert "float16 1.00 TFLOP/s" in said[0]


def test_fit_alone_is_of_what_was_prepared_last(prepared, cache, monkeypatch):
    before, asked = unsealed(json.loads((cache / "current.json").read_text())), []

    def fitted(preset, folder, wanted, log):
        asked.append((to_dict(preset), str(folder), wanted))
        return preset, None

    monkeypatch.setattr(fit, "fitted", fitted)
    prepare.command(["--fit"], standalone_mode=False)
    [(last, folder, wanted)] = asked
    assert (json.loads(json.dumps(last)), folder, wanted) == (before["preset"], before["prepared"], True)
    assert unsealed(json.loads((cache / "current.json").read_text())) == before


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_much_faster_than_the_fit_says_so_if_it_has_as_many_processes(
    prepared, cache, script, tmp_path, processes
):
    """On several machines it is faster than a fit of one."""
    record = json.loads((cache / "current.json").read_text())
    batch = record["preset"]["batch"] | {"processes": processes}
    record["fit"] = {"batch": batch, "peak_memory_mb": 1.0, "memory_bound_mb": 1e6, "tokens_per_second": 0.5}
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(record))
    done = script("train.py", "--steps", "1", "--run-dir", tmp_path / "run", AUTORESEARCH_SETTINGS=settings)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "run" / "result.json").read_text())["tokens_per_second"] / 0.5
    line = f"trained {told:.1f} times as fast as when this machine was fitted; `make fit` measures again"
    assert (line in done.stdout) == (processes == 1)
    assert ("times as fast" in done.stdout) == (processes == 1)


def test_rows_beyond_the_memory_are_refused_before_the_run(prepared, cache, script, tmp_path):
    record = json.loads((cache / "current.json").read_text())
    preset = from_dict(record["preset"])
    rows = preset.batch.rows
    peak, bound = 400.0, 1000.0
    record["fit"] = {"batch": {"rows": rows}, "peak_memory_mb": peak, "memory_bound_mb": bound}
    batch = replace(preset.batch, rows=4 * rows, tokens_per_step=4 * rows * preset.task.sequence_length)
    record["preset"] = to_dict(replace(preset, batch=batch))
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(record))
    done = script("train.py", "--steps", "1", AUTORESEARCH_SETTINGS=settings)
    assert done.returncode != 0
    assert f"use at most {int(rows * bound / peak)}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(Path(record["prepared"]).glob("*.safetensors"))
