"""Tables of other tools read and written: nothing is lost on the way, and what is wrong is named by its line."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from explorer.errors import FormatError
from explorer.sensitivity import (
    KINDS,
    PUBLISHED,
    WHOLE_NETWORK,
    SensitivityPoint,
    SensitivityTable,
    from_csv,
    from_frame,
    from_parquet,
    published,
)
from explorer.sensitivity import published as published_package

FOLDER = Path(published_package.__code__.co_filename).parent


@st.composite
def tables(draw: st.DrawFn) -> SensitivityTable:
    """Tables with every kind of entry, and layer names that a careless writer would break."""
    names = st.sampled_from(["conv1", "layer1.0.conv2", 'odd "name", with commas', "ä", " spaced "])
    numbers = st.floats(-1e6, 1e6)
    point = st.builds(
        SensitivityPoint,
        layer=names,
        sparsity=st.integers(0, 999).map(lambda n: n / 1000),
        kind=st.sampled_from(KINDS),
        value=numbers,
        refreshed=st.booleans(),
        std_error=st.none() | st.floats(0, 1e3),
        n_removed=st.none() | st.integers(0, 2**40),
    )
    return SensitivityTable.from_points(
        draw(st.lists(point, min_size=1, max_size=12)), metadata={"threads": 2, "of": ["a"]}
    )


@given(table=tables())
@settings(deadline=None)
def test_frames_and_parquet_give_back_what_they_got(table: SensitivityTable, tmp_path_factory: Any) -> None:
    assert from_frame(table.to_frame()).points == table.points
    path = tmp_path_factory.mktemp("tables") / "table.parquet"
    table.to_parquet(path)
    assert from_parquet(path) == table


@given(table=tables())
@settings(deadline=None)
def test_csv_gives_back_what_it_got(table: SensitivityTable, tmp_path_factory: Any) -> None:
    # Spaces around a name are the one thing that a file written by hand may hold by accident.
    points = [p for p in table.points if p.layer.strip() == p.layer]
    if not points:
        return
    path = tmp_path_factory.mktemp("tables") / "table.csv"
    text = SensitivityTable.from_points(points).to_csv(path)
    assert path.read_text(encoding="utf-8") == text
    assert from_csv(path).points == tuple(points)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tables_hold_the_published_numbers(name: str) -> None:
    table = published(name)
    with (FOLDER / f"{name}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    seen = set()
    for row in rows:
        layer = row["parameter"].removeprefix("module.").replace(".module.", ".").removesuffix(".weight")
        if layer.endswith("downsample.1"):
            assert layer not in table.layers
            continue
        seen.add(layer)
        sparsity = round(float(row["sparsity"]), 2)
        loss, accuracy = table.point(layer, sparsity, "loss"), table.point(layer, sparsity, "accuracy")
        assert loss is not None
        assert accuracy is not None
        assert loss.value == float(row["loss"])
        assert accuracy.value == pytest.approx(float(row["top1"]) / 100, abs=1e-12)
    assert set(table.layers) == seen
    assert "Apache-2.0" in table.metadata["source"]
    assert table.metadata["network"] == PUBLISHED[name]


def test_resnet50_has_its_54_layers_and_known_values() -> None:
    table = published("resnet50-imagenet")
    assert len(table.layers) == 54
    assert table.layers[0] == "conv1"
    assert table.baseline("accuracy") == pytest.approx(0.7613)
    assert table.value("conv1", 0.5, "loss") == pytest.approx(1.1045055773337278)
    assert table.value("conv1", 0.9, "accuracy") == pytest.approx(0.1293, abs=1e-4)


def test_there_is_no_other_published_table() -> None:
    with pytest.raises(FormatError, match="resnet50-imagenet"):
        published("resnet51")


def test_layers_are_renamed_chosen_and_ordered(tmp_path: Path) -> None:
    path = tmp_path / "distiller.csv"
    path.write_text(
        "parameter,sparsity,top1,top5,loss\n"
        "module.a.weight,0.0,90,99,0.5\nmodule.a.weight,0.15000000000000002,80,98,0.6\nmodule.b.module.0.weight,0.5,70,97,0.7\n",
        encoding="utf-8",
    )
    table = from_csv(path)
    assert table.layers == ("a", "b.0")
    assert table.levels("loss", "a") == (0.0, 0.15)
    renamed = from_csv(path, rename={"b.0": "first"}, layers=["first", "a"])
    assert renamed.layers == ("first", "a")
    assert renamed.value("first", 0.5, "accuracy") == 0.7
    assert from_csv(path, rename=str.upper).layers == ("A", "B.0")
    assert from_csv(path, layers=["a"]).layers == ("a",)
    with pytest.raises(FormatError, match=r"no values of c; it has a, b\.0"):
        from_csv(path, layers=["c"])
    with pytest.raises(FormatError, match="would be called 'x'"):
        from_csv(path, rename=lambda _: "x")


def test_times_measured_elsewhere_serve_as_latencies(tmp_path: Path) -> None:
    """An affine device: plan here, deploy there."""
    path = tmp_path / "phone.csv"
    lines = ["layer,sparsity,latency_ms,spread_ms"]
    for sparsity in (0.0, 0.5, 0.9):
        a, b = 4.0 * (1 - sparsity), 2.0 * (1 - sparsity)
        lines += [f"a,{sparsity},{a},0.1", f"b,{sparsity},{b},", f",{sparsity},{a + b + 1.5},"]
    path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n\r\n", encoding="utf-8")
    table = from_csv(path)
    assert table.layers == ("a", "b")
    assert table.value("a", 0.5, "latency_ms") == 2.0
    assert table.std_error_at("a", 0.5, "latency_ms") == 0.1
    assert table.point(WHOLE_NETWORK, 0.9, "latency_ms") is not None
    assert table.fixed_latency_ms == pytest.approx(1.5)
    losses = published("resnet18-imagenet")
    both = losses.merge(from_csv(path, rename={"a": "conv1"}))
    assert {"loss", "accuracy", "latency_ms"} <= set(both.kinds)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with ''"),
        ("name,zeros\na,1\n", "Accepted are tidy points"),
        ("layer,sparsity,latency_ms\n", "a header and no values"),
        ("layer,sparsity,latency_ms\na,0.5\n", "line 2: 2 values, but the header names 3"),
        ("layer,sparsity,latency_ms\na,0.5,1\nb,1.0,1\n", "line 3: sparsity is 1.0"),
        ("layer,sparsity,latency_ms\na,50,1\n", "fraction of zeros"),
        ("layer,sparsity,latency_ms\na,0.5,fast\n", "latency_ms is 'fast', which is no number"),
        ("layer,sparsity,latency_ms\na,0.5,nan\n", "only finite numbers"),
        ("layer,sparsity,latency_ms\na,0.5,-1\n", "cannot be negative"),
        ("parameter,sparsity,top1,top5,loss\na.bias,0.5,50,60,1\n", "names of weights end with"),
        ("parameter,sparsity,top1,top5,loss\na.weight,0.5,101,60,1\n", "it is a percentage"),
        ("layer,sparsity,kind,value\na,0.5,speed,1\n", "kind is 'speed'; known are kl"),
        ("layer,sparsity,kind,value,refreshed\na,0.5,kl,1,maybe\n", "it is 0 or 1"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FormatError) as error:
        from_csv(path)
    assert message in str(error.value)
    assert "table.csv" in str(error.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="No such file"):
        from_csv(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="not UTF-8"):
        from_csv(tmp_path / "binary.csv")
    (tmp_path / "no.parquet").write_bytes(b"PAR0")
    with pytest.raises(FormatError, match="as Parquet"):
        from_parquet(tmp_path / "no.parquet")
    table = published("resnet20-cifar")
    for write in (table.to_csv, table.to_parquet):
        with pytest.raises(FormatError, match="Cannot write"):
            write(tmp_path)


def test_frames_that_lack_something_are_refused(tmp_path: Path) -> None:
    frame = published("resnet20-cifar").to_frame()
    with pytest.raises(FormatError, match="lacks value"):
        from_frame(frame.drop(columns="value"))
    wrong = frame.copy()
    wrong.loc[3, "sparsity"] = 2.0
    with pytest.raises(FormatError, match=r"Row 3 .* sparsity is 2\.0"):
        from_frame(wrong)
    frame.drop(columns="kind").to_parquet(tmp_path / "other.parquet")
    with pytest.raises(FormatError, match="lacks the columns kind"):
        from_parquet(tmp_path / "other.parquet")


def test_without_pandas_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import importlib

    real = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] in ("pandas", "pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    table = published("resnet20-cifar")
    with pytest.raises(FormatError, match="pip install pandas"):
        table.to_frame()
    with pytest.raises(FormatError, match="pip install pyarrow"):
        table.to_parquet(tmp_path / "t.parquet")
    assert table.to_csv().startswith("layer,sparsity,kind,value")
