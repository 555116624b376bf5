"""README.md's tables of figures: what the JSON files of the record give, and nothing else."""

import json

import pytest

from benchmarks import __main__ as program
from benchmarks import table, timing
from benchmarks.peers import environment

MACHINE = {"cpu": "A CPU", "bf16_units": "amx_bf16", "cores": "2", "torch": "2", "peers": "trl 1", "commit": "0" * 40}


def row(work="SFT step, small", *, ratio=2.0, target=1.8, seconds=(0.5, 0.4, 12.5), **more):
    return {
        "work": work, "peer": "TRL", "ours, ms": timing.spread(list(seconds)), "peer, ms": "1000 [900 to 1100]",
        "ours, tokens/s": 1.0, "ratio": ratio, "target": target, "of roofline": 0.411,
        "seconds": {"ours": list(seconds)},
    } | more  # fmt: skip


def memory(ratio):
    return {"work": "PPO", "peer": "TRL 1.12", "ours, MB": 500.4, "peer, MB": 1000, "ratio": ratio, "target": 0.5}


def write(folder, name, *rows, taken="2026-11-30T10:00:00+00:00", **machine):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"taken": taken, "machine": MACHINE | machine, "rows": list(rows)}))


def test_the_readme_shows_what_the_record_gives():
    """`python -m benchmarks table` writes it."""
    text = table.README.read_text(encoding="utf-8")
    assert table.replace(text, table.tables(table.RECORD, program.COMPARISONS)) == text


def test_a_run_is_kept_and_its_rows_are_shown_in_the_programs_order(tmp_path, monkeypatch):
    run, record, readme = tmp_path / "run", tmp_path / "record", tmp_path / "README.md"
    write(run, "sft-gpt2-cpu", row("SFT step, gpt2", seconds=(1.0, 2.0)), commit="1" * 40 + "-dirty")
    write(run, "sft-small-cpu", row())
    write(run, "memory-small-cpu", memory(0.5))
    write(run, "phases-small-cpu", row("no comparison"))
    write(run, "sft-tiny-cpu", row("of the tests"))
    readme.write_text("before\n<!-- table -->\n| old |\n<!-- end of table -->\nafter\n")
    monkeypatch.setattr(table, "RECORD", record)
    monkeypatch.setattr(table, "README", readme)
    table.run(run, ("sft", "memory"))
    assert readme.read_text() == (
        "before\n<!-- table -->\n"
        "2 cores, A CPU (bf16 units: amx_bf16), torch 2, trl 1; 2026-11-30, commit 000000000 and 111111111-dirty; "
        "medians of 2 or 3 rounds [lowest to highest].\n\n"
        "| work | peer | ours | peer's | ratio | aim | of the roofline |\n|---|---|---|---|---|---|---|\n"
        "| SFT step, small | TRL | 500 [400 to 12500] ms | 1000 [900 to 1100] ms | 2.00 | 1.8 | 0.41 |\n"
        "| SFT step, gpt2 | TRL | 1500 [1000 to 2000] ms | 1000 [900 to 1100] ms | 2.00 | 1.8 | 0.41 |\n"
        "| PPO | TRL 1.12 | 500 MB | 1000 MB | 0.50 | 0.5 |  |\n"
        "<!-- end of table -->\nafter\n"
    )
    write(run, "sft-small-cpu", row("SFT step, again"))
    table.run(run, ("sft", "memory"))
    assert "again" in readme.read_text()
    assert "SFT step, small" not in readme.read_text()
    before = readme.read_text()
    table.run(None, ("sft", "memory"))
    assert readme.read_text() == before


@pytest.mark.parametrize(
    ("made", "aim"),
    [
        (row(ratio=1.79), "1.8, missed"), (row(ratio=1.8), "1.8"), (row(target=0.0), ""),
        (memory(0.51), "0.5, missed"), (memory(0.49), "0.5"),
    ],
)  # fmt: skip
def test_aims_are_missed_from_above_where_less_is_better(tmp_path, made, aim):
    write(tmp_path / "amx_bf16", "sft-small-cpu", made)
    assert f" | {made['ratio']:.2f} | {aim} | " in table.tables(tmp_path, ("sft",))


def test_every_kind_of_cpu_has_a_table(tmp_path):
    for units in ("amx_bf16", "avx512_bf16"):
        write(tmp_path / "run", "sft-small-cpu", row(f"SFT on {units}"), bf16_units=units)
        table.keep(tmp_path / "run", tmp_path / "record", ("sft",))
    made = table.tables(tmp_path / "record", ("sft",))
    assert [made.count(text) for text in ("| work |", "SFT on amx_bf16", "SFT on avx512_bf16")] == [2, 1, 1]


def test_figures_of_two_machines_are_not_mixed(tmp_path):
    write(tmp_path / "amx_bf16", "sft-small-cpu", row())
    write(tmp_path / "amx_bf16", "sft-gpt2-cpu", row(), torch="3")
    with pytest.raises(SystemExit, match="torch differs between files: 2 and 3; run all of them again"):
        table.tables(tmp_path, ("sft",))


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"the folder holds no results such as sft-small-cpu\.json"):
        table.keep(tmp_path, tmp_path / "record", program.COMPARISONS)


def test_other_programs_take_no_folder(tmp_path):
    with pytest.raises(SystemExit, match="--output says where results go"):
        program.main(program.Benchmarks("sft", folder=tmp_path))


def test_results_say_what_their_figures_depend_on():
    facts = timing.machine()
    assert set(table._ALIKE) | {"commit"} <= set(facts)
    assert all(facts.values())
    assert facts["peers"] == environment.pinned()
    assert facts["peers"].startswith("transformers 5.")
    assert facts["peers"].endswith("for PPO trl 1.12.0")
