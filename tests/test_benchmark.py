"""The benchmark: its tables, its memory, several processes, and what the profiler's events are counted as."""

import json
import types

import pytest
import torch

from lab import benchmark, benchmark_profile

SMALL_BENCHMARK = ["--batch-size", "4", "--image-size", "64", "--repeats", "2", "--warmup", "0"]


def test_benchmark_measures_steps_parts_and_transforms(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "GROWTH", {"batch_size": (2, 4), "heatmap_size": (3,)})
    tables = ["--tables", "steps", "parts", "growth", "transforms"]
    with pytest.warns(UserWarning, match="FullGrad looks through every BatchNorm"):
        benchmark.main([*SMALL_BENCHMARK, *tables, "--no-memory", "--json", str(tmp_path / "cost.json")])
    found = json.loads((tmp_path / "cost.json").read_text())
    assert all(len(times) == 2 for times in found["seconds"].values())
    printed = capsys.readouterr().out
    for name in [*found["seconds"], *found["profiled"], *found["growth"], *found["transforms"]]:
        assert f"| {name} |" in printed
    assert list(found["growth"]) == ["batch size 2", "batch size 4", "heatmap size 3"]


def test_benchmark_takes_the_parts_of_a_step_in_bfloat16(monkeypatch, capsys):
    seen = set()

    def watched(step, model):
        with model.layer4.register_forward_hook(lambda module, args, output: seen.add(output.dtype)):
            return benchmark_profile.profile_step(step, model)

    monkeypatch.setattr(benchmark, "profile_step", watched)
    sizes = ["--batch-size", "2", "--image-size", "64", "--repeats", "2", "--warmup", "0"]
    benchmark.main([*sizes, "--tables", "parts", "--amp"])
    assert seen == {torch.bfloat16}
    assert "| together |" in capsys.readouterr().out


def test_benchmark_compares_a_row_with_the_one_it_goes_beside(capsys):
    row = "`reg(model, x)`"
    benchmark.main([*SMALL_BENCHMARK, "--tables", "steps", "--no-memory", "--rows", row])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[0].lstrip("| ") for line in lines[2:]] == ["cross-entropy on x", "cross-entropy on three views", row]
    assert lines[-1][3] == "cross-entropy on three views"


def test_benchmark_has_compiled_steps(capsys):
    # What the compiler makes of them is for the benchmark, and takes minutes.
    with torch.compiler.set_stance("force_eager"):
        compiled = ["--compile", "--channels-last", "--amp", "--rows", "compiled, bfloat16: "]
        benchmark.main([*SMALL_BENCHMARK, *compiled, "--tables", "steps", "--no-memory"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [line[0].lstrip("| ") for line in lines[2:]]
    assert names[:2] == ["cross-entropy on x", "compiled, bfloat16: cross-entropy on both views"]
    assert sum("`compile_below`" in name for name in names) == 4
    assert sum("layer exposed" in name for name in names) == 1


def test_benchmark_measures_clips(capsys):
    clips = ["--model", "r3d_18", "--frames", "4", "--image-size", "32"]
    benchmark.main([*SMALL_BENCHMARK, *clips, "--tables", "steps", "--no-memory", "--rows", "`reg.compute`"])
    printed = capsys.readouterr().out
    assert "r3d_18, 4 x 32 x 32, batch 4" in printed
    assert "| `reg.compute` |" in printed
    with pytest.raises(SystemExit):
        benchmark.main([*SMALL_BENCHMARK, *clips])
    assert "--frames must go with --tables steps" in capsys.readouterr().err


def test_benchmark_takes_memory_from_a_process_of_its_own():
    args = benchmark.parse_args(SMALL_BENCHMARK)
    parts = json.dumps({**benchmark.sizes_of(args), "batch_size": 2})
    assert 0 < benchmark.memory_of(args, parts) < benchmark.memory_of(args, "`reg.compute`")


def test_benchmark_runs_steps_in_several_processes(capsys):
    args = benchmark.parse_args(SMALL_BENCHMARK)
    found = benchmark.measure_processes(args, (2,))
    table = benchmark.processes_table(found)
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| 2"]
    assert all(value > 0 for one in found.values() for value in one.values())


def test_profile_gives_each_part_its_own_calls_and_backward():
    class Event:
        def __init__(self, name, start, end, sequence_nr=-1):
            self.name, self.sequence_nr = name, sequence_nr
            self.time_range = types.SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)

    warp, heatmaps = benchmark_profile.WARP_IMAGES, benchmark_profile.HEATMAPS
    node = "autograd::engine::evaluate_function: "
    found = benchmark_profile.shares(
        [
            Event("the step", 0, 200),
            Event("reg.compute", 0, 100),
            Event("the model", 5, 45),
            Event("aten::conv", 10, 40, sequence_nr=1),
            Event(warp, 50, 60),
            Event("aten::sin", 52, 55, sequence_nr=2),
            Event(heatmaps, 70, 90),
            Event("aten::gather", 71, 72, sequence_nr=4),
            Event(node + "Gather", 72, 80, sequence_nr=4),  # the inner gradient, counted with the call
            Event("aten::mul", 82, 85, sequence_nr=3),
            Event(node + "Mul", 110, 130, sequence_nr=3),
            Event(node + "Sin", 130, 134, sequence_nr=2),
            Event(node + "Conv", 140, 190, sequence_nr=1),
        ]
    )
    assert found[warp] == (10 + 4) / 200
    assert found[heatmaps] == (20 + 20) / 200
    assert found[benchmark_profile.REST] == (100 - 40 - 10 - 20) / 200
    assert sum(found.values()) == pytest.approx(84 / 200)
