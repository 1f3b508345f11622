"""The report: what is in it, and how a browser shows it."""

import copy
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from convert.errors import UserError
from jaxprune.commands.report import main as report_main
from jaxprune.evaluation.perplexity import short_name
from jaxprune.reporting import plots, report
from jaxprune.reporting.record import Record, load, read

LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def quality(
    perplexity: float | None, kl: float | None = None, acc: float | None = None
) -> dict[str, Any]:
    text: dict[str, Any] = {"windows": [4, 128], "perplexity": perplexity}
    if kl is not None:
        text |= {"ratio": (perplexity or 1.0) / 10.0, "kl": kl, "top1": 0.5}
    made: dict[str, Any] = {"texts": {"wikitext2": text}, "tasks": {}, "seconds": {}}
    if acc is not None:
        made["tasks"] = {
            "boolq": {"acc": acc, "acc_stderr": 0.02},
            "hellaswag": {
                "acc": acc / 2,
                "acc_stderr": 0.02,
                "acc_norm": acc / 1.5,
                "acc_norm_stderr": 0.02,
            },
        }
    return made


def run_record(
    out: str = "pruned", method: str = "admm", pattern: str = "50 %", **changes: Any
) -> dict[str, Any]:
    kind: dict[str, Any] = {"n": 2, "m": 4}
    if pattern != "2:4":
        kind = {"sparsity": float(pattern.removesuffix(" %")) / 100}
    recipe = {"method": {"name": method, "options": {}}, "pattern": kind} | changes.pop(
        "recipe", {}
    )
    linear = {"zeros": 50, "wanted": 50, "size": 100, "stats": {}}
    layers = [
        {
            "index": index,
            "seconds": {"gram": 1.0},
            "kernels": {name: {"error": 0.01 * (index + 1)} | linear for name in LINEARS},
        }
        for index in range(6)
    ]
    return {
        "schema": 3,
        "kind": "run",
        "config": {"ckpt": "llama-7b", "out": out, "calib": "c4"},
        "checkpoint": "llama-7b",
        "recipe": recipe,
        "calibration": {"windows": [16, 512], "sha256": "0" * 64},
        "sparsity": 0.5,
        "evaluation": {"dense": quality(10.0, acc=0.7), "pruned": quality(13.0, kl=0.25, acc=0.6)},
        "seconds": {"gram": 5.0, "solve": 8.0, "total": 15.0},
        "peak_bytes": {"host": 2_000_000_000},
        "layers": layers,
        "hardware": "2 cores",
        "versions": {},
        **changes,
    }


def evaluation_record(
    checkpoints: dict[str, Any], against: str | None = "llama-7b"
) -> dict[str, Any]:
    config = {"out": "evaluation"}
    record = {"schema": 3, "kind": "evaluation", "config": config, "against": against}
    return record | {"checkpoints": checkpoints, "hardware": "a GPU"}


def parsed(*records: dict[str, Any]) -> list[Record]:
    return [read(json.dumps(record), "jaxprune.json") for record in records]


def page_of(*records: dict[str, Any]) -> str:
    return report.page(parsed(*records))


def several() -> list[dict[str, Any]]:
    """Runs of two methods at two sparsities, one of them to rubble."""
    records = []
    for method, kl in (("admm", 0.2), ("wanda", 0.4)):
        for sparsity, pattern in ((0.5, "50 %"), (0.7, "70 %"), (0.5, "2:4")):
            measured = {
                "dense": quality(10.0, acc=0.7),
                "pruned": quality(20 * sparsity**-1, kl=kl / sparsity, acc=0.5),
            }
            name = f"out/{method}-{pattern.replace(' %', '').replace(':', 'of')}"
            records.append(
                run_record(name, method, pattern, sparsity=sparsity, evaluation=measured)
            )
    records[-1]["evaluation"]["pruned"] = quality(None, kl=9.0, acc=0.3)
    return records


def test_a_run_is_a_dense_and_a_pruned_entry() -> None:
    dense, pruned = report.checkpoints_of(parsed(run_record()))
    assert (dense.name, dense.dense, dense.label) == ("llama-7b", True, "llama-7b (dense)")
    assert dense.accuracy == pytest.approx(0.525)
    assert dense.sparsity is None  # nobody counted its zeros
    assert (pruned.label, pruned.method, pruned.pattern, pruned.sparsity) == (
        "pruned",
        "admm",
        "50 %",
        0.5,
    )
    assert pruned.quality.texts["wikitext2"].kl == 0.25 and pruned.text("c4") is None


def test_records_of_one_checkpoint_are_merged() -> None:
    run = run_record(evaluation={})
    c4 = {"texts": {"c4": {"windows": [2, 8], "perplexity": 30.0}}, "tasks": {}, "seconds": {}}
    both = {
        "llama-7b": {"sparsity": 0.0, "run": None, "quality": c4},
        "elsewhere/pruned": {"sparsity": 0.5, "run": run, "quality": quality(13.0, kl=0.2)},
        "elsewhere/other": {"sparsity": 0.41, "run": None, "quality": quality(15.0)},
    }
    found = report.checkpoints_of(
        parsed(run, evaluation_record(both), run_record(evaluation={"dense": quality(10.0)}))
    )
    assert [(entry.label, entry.dense) for entry in found] == [
        ("llama-7b (dense)", True), ("pruned", False), ("other", False),
    ]  # fmt: skip
    assert found[0].quality.texts.keys() == {"c4", "wikitext2"}
    assert found[1].run and found[1].quality.texts["wikitext2"].kl == 0.2
    assert found[2].pattern == "41.0 %" and found[2].number == 1


def test_the_zeros_of_a_dense_checkpoint_are_those_that_were_counted() -> None:
    counted = evaluation_record(
        {"llama-7b": {"sparsity": 0.0003, "run": None, "quality": quality(10.0)}}
    )
    for given in ((run_record(), counted), (counted, run_record())):
        assert report.checkpoints_of(parsed(*given))[0].sparsity == 0.0003


def test_the_mean_is_that_of_the_merged_tasks() -> None:
    rte = {
        "texts": {},
        "tasks": {"glue": {"acc": 0.2}, "rte": {"acc": 0.9, "acc_stderr": 0.03}},
        "groups": ["glue"],
        "seconds": {},
    }
    (dense,) = report.checkpoints_of(
        parsed(
            *(
                evaluation_record({"llama-7b": {"sparsity": 0.0, "run": None, "quality": one}})
                for one in (quality(10.0, acc=0.6), rte)
            )
        )
    )
    assert dense.accuracy == pytest.approx((0.6 + 0.3 + 0.9) / 3)


def test_checkpoints_of_one_name_are_distinguished() -> None:
    records = [run_record("a/out", method="admm"), run_record("b/out", method="wanda")]
    assert [entry.label for entry in report.checkpoints_of(parsed(*records))] == [
        "llama-7b (dense)",
        "a/out",
        "b/out",
    ]


def on_windows(windows: list[int], dense: float, pruned: float, **changes: Any) -> dict[str, Any]:
    """A run whose qualities were measured on windows of a shape."""
    measured = {"dense": quality(dense), "pruned": quality(pruned, kl=0.25)}
    for one in measured.values():
        one["texts"]["wikitext2"]["windows"] = windows
    measured["pruned"]["texts"]["wikitext2"]["ratio"] = pruned / dense
    return run_record(evaluation=measured, **changes)


def test_measures_on_other_windows_have_columns_of_their_own() -> None:
    records = [
        on_windows([32, 512], 21.41, 42.17, out="short"),
        on_windows([4, 2048], 15.0, 26.98, out="long"),
    ]
    page = page_of(*records)
    rows = {
        cells[0]: cells[4:12]
        for row in re.findall(r"<tr><td>.*?</tr>", page, re.DOTALL)
        if len(cells := re.findall(r"<td.*?>(.*?)</td>", row, re.DOTALL)) >= 12
    }
    none = ["–"] * 4
    measured = ["0.2500", "50.00 %"]
    assert rows == {
        "llama-7b (dense)": ["21.41", "–", "–", "–", "15.00", "–", "–", "–"],
        "short": ["42.17", "1.970", *measured, *none],
        "long": [*none, "26.98", "1.799", *measured],
    }
    for windows, length in ((32, 512), (4, 2048)):
        assert f"<br>wikitext2 ({windows} × {length} tokens)</th>" in page
        assert f"{windows} windows of {length} tokens" in page
        assert f"Perplexity of wikitext2 ({windows} × {length} tokens)" in headings(page)
    same = page_of(records[0], on_windows([32, 512], 21.42, 30.0, out="other"))
    assert same.count("perplexity<br>wikitext2</th>") == 1


def test_dense_perplexities_that_disagree_are_refused() -> None:
    records = [on_windows([4, 128], dense, 20.0, out=str(dense)) for dense in (10.0, 12.0)]
    with pytest.raises(UserError, match=r"perplexity of llama-7b on wikitext2, 10 and 12"):
        page_of(*records)


def test_a_title_counts_the_pruned_checkpoints() -> None:
    alone = {"llama-7b": {"sparsity": 0.0, "run": None, "quality": quality(10.0)}}
    for given, title in (
        (several(), "6 pruned checkpoints"),
        ([evaluation_record(alone)], "1 dense checkpoint"),
    ):
        assert f"<h1>{title}</h1>" in page_of(*given)


def headings(page: str) -> list[str]:
    return re.findall(r"<h[23]>(.*?)</h[23]>", page)


def test_what_was_measured_is_in_the_page() -> None:
    page = page_of(run_record())
    for text in (
        "13.00",
        "10.00",
        "0.2500",
        "50.00 %",
        "45.00",
        "Measured on 2 cores",
        "50.0000 %",
    ):
        assert text in page, text
    assert "Time by phase" in headings(page) and "Quality, size and speed" not in headings(page)
    page = page_of(*several())
    assert {"Quality, size and speed", "KL divergence on wikitext2 by sparsity"} <= set(
        headings(page)
    )
    assert "∞" in page


def test_what_a_tuning_did_is_a_curve() -> None:
    title = "KL divergence on held-out text"
    text = {
        "sha256": "0" * 64,
        "length": 32,
        "seed": 0,
        "held_out": 16,
        "held_out_sha256": "0" * 64,
    }
    assert title in page_of(run_record(divergences=[[1024, 0.5], [2048, 0.4]], tuning_text=text))
    assert title not in page_of(run_record())


def test_measures_before_all_zeros_are_there_are_marked() -> None:
    points = [[tokens, 0.5] for tokens in (0, 500, 700, 1000)]

    def dotted(pattern: str = "60 %", **tuning: float) -> int:
        found = report.checkpoints_of(
            parsed(run_record(pattern=pattern, divergences=points, recipe={"tuning": tuning}))
        )[1:]
        return plots.divergence_by_tokens(found).svg.count("stroke-dasharray")

    assert (
        dotted(tune_tokens=1000, tune_gradual=0.5)
        == dotted(tune_tokens=10**400, tune_gradual=0.5)
        == 1
    )
    assert not dotted(tune_tokens=1000) and not dotted(tune_tokens=0, tune_gradual=0.5)
    assert not dotted("50 %", tune_tokens=1000, tune_gradual=0.5)


def test_one_sparsity_makes_no_curve() -> None:
    records = [run_record("a/admm"), run_record("a/wanda", method="wanda")]
    assert "Quality, size and speed" not in headings(page_of(*records))


def test_files_are_named_by_the_end_of_their_path() -> None:
    record = run_record()
    for measured in record["evaluation"].values():
        measured["texts"] = {
            "/home/someone/data/wiki/validation.jsonl": measured["texts"]["wikitext2"]
        }
    page = page_of(record)
    assert "Perplexity of wiki/validation" in headings(page)
    assert "/home/someone" not in page.partition("<h2>Details")[0]


def test_a_run_without_evaluation_has_a_report() -> None:
    page = page_of(run_record(evaluation={}))
    assert headings(page)[:2] == [
        "What was done",
        "Summary",
    ] and "Relative error by layer" in headings(page)
    assert "perplexity" not in page.partition("<h2>Details")[0].partition("</style>")[2]


def test_the_page_is_self_contained_and_its_ids_are_unique() -> None:
    page = page_of(*several())
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page)
    assert "@import" not in page and "<script" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 50
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert page == page_of(*several())


def test_names_cannot_inject_markup() -> None:
    record = run_record(out="<script>alert(1)</script>")
    record["config"]["ckpt"] = "x/<b>bold</b>"
    page = page_of(record)
    assert "<script>" not in page and "<b>bold" not in page


@pytest.mark.parametrize(
    "name",
    [
        "$\\frac{$",
        "_hidden_",
        "100 %",
        "back\\slash",
        "a\tb\x00\x1b[2J",
        "名前",
        "שלום",
        "x" * 3000,
        "",
        ".",
        "..",
        "/",
    ],
)
def test_no_name_keeps_a_report_from_being_drawn(name: str) -> None:
    """Names are text, never mathtext; what the font lacks is a box, and no warning."""
    records = [
        run_record(f"out/{name}"),
        run_record(f"more/{name}x", method="wanda"),
        run_record(name, pattern="2:4"),
    ]
    for record in records:
        record["config"] |= {"ckpt": name, "calib": name}
        for measured in record["evaluation"].values():
            measured["texts"] = {name: measured["texts"]["wikitext2"]}
            measured["tasks"] = {
                name: measured["tasks"]["boolq"],
                f"{name}2": measured["tasks"]["boolq"],
            }
        record["seconds"] = {name: 1.0, "total": 1.0}
        record["layers"][0]["kernels"] = {name: record["layers"][0]["kernels"][LINEARS[0]]}
    page = page_of(*records)
    assert page.count("<svg") >= 8 and page.count("<html") == 1


@pytest.mark.parametrize("number", [None, 0.0, 1e-300, 1e-30, 0.5, 1.0, 10.0, 1e12, 1e308])
def test_no_number_keeps_a_plot_from_being_drawn(number: float | None) -> None:
    """Not finite (null), 0, one value, equal values, values of all sizes."""
    records = [run_record(out, pattern=pattern) for out, pattern in (("a", "50 %"), ("b", "70 %"))]
    for record in records:
        record["evaluation"]["pruned"]["texts"]["wikitext2"] |= {
            "perplexity": number or None,
            "kl": number,
        }
        for layer in record["layers"]:
            for linear in layer["kernels"].values():
                linear["error"] = number
        record["seconds"] = {"solve": number}
    found = report.checkpoints_of(parsed(*records))
    runs = found[1:]
    drawn = [
        plots.quality_by_checkpoint(
            found, "", "", lambda one: one.text("wikitext2").perplexity, log=True
        ),
        plots.quality_by_checkpoint(runs, "", "", lambda one: one.text("wikitext2").kl, log=False),
    ]
    drawn += [
        plots.error_by_layer(runs),
        plots.error_by_layer(runs[:1]),
        plots.error_by_linear(runs),
    ]
    drawn.append(plots.time_by_phase(runs))
    assert all("<path" in plot.svg for plot in drawn)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "jaxprune.json: it is missing"),
        ("{", "it is not valid JSON"),
        ("[]", "cannot be used, found \\[\\]"),
        ('{"kind": "run", "schema": 3}', "config: an entry is missing"),
        ('{"schema": 3, "method": {}}', "kind: an entry is missing"),
        (
            '{"kind": "run", "schema": 4}',
            "schema: it was written by another version of jaxprune, found 4, wanted 3",
        ),
        (
            '{"kind": "run"}',
            "schema: an entry is missing",
        ),
    ],
)
def test_a_folder_without_a_record_is_one_error(
    content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "jaxprune.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number, record in enumerate(several()[:2]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "jaxprune.json").write_text(json.dumps(record))
    args = [str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(tmp_path / "new" / "page.html")]
    assert report_main(args) == 0
    assert (tmp_path / "new/page.html").read_text().startswith("<!doctype html>")
    assert report_main(args) == 2
    assert "already exists" in capsys.readouterr().err
    assert report_main([*args, "--overwrite"]) == 0
    assert report_main([str(tmp_path), "--out", str(tmp_path / "x.html")]) == 2


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, from the system."""
    from playwright.sync_api import sync_playwright

    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have a browser")
        pytest.skip("no Chromium here: install the system's package")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("records", [[run_record()], several()], ids=["run", "several"])
def test_a_browser_shows_it(
    records: list[dict[str, Any]], scheme: str, width: int, browser: Any, tmp_path: Path
) -> None:
    records = copy.deepcopy(records)
    records[0]["config"]["ckpt"] = "someone/" + "a-very-long-name-" * 8
    (tmp_path / "report.html").write_text(page_of(*records))
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on(
        "request",
        lambda request: (
            messages.append(request.url) if not request.url.startswith("file:") else None
        ),
    )
    page.goto((tmp_path / "report.html").as_uri())
    assert [m for m in messages if not m.startswith("data:")] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.evaluate(
        "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().toJSON())"
    )
    assert len(sizes) >= 7
    assert all(100 < size["height"] and 250 < size["width"] <= width for size in sizes)
    shown = page.evaluate(
        "[...document.querySelectorAll('body, figure, td, h1, figure svg path')].map(e => "
        "[getComputedStyle(e).backgroundColor, getComputedStyle(e).color, "
        "getComputedStyle(e).fill])"
    )
    bright = [
        sum(map(int, re.findall(r"\d+", color)[:3])) > 382 for color in (shown[0][0], shown[0][1])
    ]
    assert bright == ([True, False] if scheme == "light" else [False, True])
    first_column = page.evaluate("document.querySelector('tbody td').getBoundingClientRect().width")
    assert first_column >= 100
    page.close()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("wikitext2", "wikitext2"),
        ("data/c4/train.jsonl", "c4/train"),
        ("a/chats.jsonl:3,c4:1", "a/chats.jsonl:3,c4:1"),
        ("c4,data/a/b.jsonl", "c4,a/b"),
    ],
)
def test_texts_have_short_names(text: str, name: str) -> None:
    assert short_name(text) == name


def test_a_verdict_and_sizes_on_disk_are_shown() -> None:
    def measured(size: int, parameters: int, **found: float) -> dict[str, Any]:
        sizes = {"disk_bytes": size, "parameters": parameters}
        return {"sparsity": 0.5, "run": None, "quality": quality(**found)} | sizes

    checkpoints = {
        "dense": measured(60_000_000, 100_000_000, perplexity=10.0) | {"sparsity": 0.0},
        "pruned": measured(400_000_000, 100_000_000, perplexity=13.0, kl=0.25),
        "fewer": measured(150_000_000, 75_000_000, perplexity=13.0, kl=0.25),
    }
    head = {"schema": 3, "kind": "evaluation", "config": {}, "against": "dense"}
    page = report.page([read(json.dumps(head | {"checkpoints": checkpoints}), "x")])
    sentence = (
        "pruned, 50 % zeros: on wikitext2 its perplexity is 1.30 times the dense model&#39;s, and "
        "at 50 % of"
    )
    assert sentence in page and "dense, " not in page.partition("<main>")[0]
    assert "Perplexity of wikitext2 by size" in page
    for sizes in ("200 MB</td><td>60 MB", "200 MB</td><td>400 MB", "150 MB</td><td>150 MB"):
        assert f"<td>{sizes}</td>" in page
    del checkpoints["fewer"]  # the others have as many parameters, and only their files differ
    page = report.page([read(json.dumps(head | {"checkpoints": checkpoints}), "x")])
    assert "by size" not in page and "<td>200 MB</td><td>400 MB</td>" in page
    for one in checkpoints.values():
        del one["parameters"]  # as earlier versions wrote it
    page = report.page([read(json.dumps(head | {"checkpoints": checkpoints}), "x")])
    assert "by size" not in page and "16 bits" not in page
