from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from explorer.errors import FormatError
from explorer.formats import Recipe
from explorer.pruning import RunSettings

A_RECIPE = """
recipe: sparsity-explorer
version: 1
model: demo:fashion-resnet
data: demo:fashion
method: gmp
distribution:
  stem.conv: {sparsity: 0.0, locked: true}
  fc: {sparsity: 0.9}
"""

names = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x85\u2028\u2029"), min_size=1)
sparsities = st.floats(0.0, 0.999)
settings = st.builds(
    RunSettings,
    epochs=st.one_of(st.integers(1, 100), st.floats(0.01, 100.0)),
    batch_size=st.integers(1, 1024),
    learning_rate=st.floats(1e-8, 1.0),
    momentum=st.floats(0.0, 0.99),
    weight_decay=st.floats(0.0, 1e-2),
    stabilise=st.floats(0.0, 0.5),
    ramp=st.floats(0.0, 0.5),
    update_every=st.integers(1, 1000),
    distillation=st.floats(0.0, 1.0),
    temperature=st.floats(0.1, 10.0),
    seed=st.integers(0, 2**32),
    threads=st.one_of(st.none(), st.integers(1, 64)),
    evaluate_every=st.one_of(st.none(), st.integers(1, 1000)),
    n_validation=st.one_of(st.none(), st.integers(1, 1000)),
)


def _groupings(distribution: dict[str, float]) -> list[list[list[str]]]:
    """No group, and one of all layers that have the same sparsity as the first."""
    same = [name for name, value in distribution.items() if value == next(iter(distribution.values()))]
    return [[], [same]] if len(same) > 1 else [[]]


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    distribution = draw(st.dictionaries(names, sparsities, max_size=5))
    return Recipe(
        model=draw(names),
        data=draw(names),
        distribution=distribution,
        locked=tuple(name for name in distribution if draw(st.booleans())),
        groups=tuple(tuple(sorted(group)) for group in draw(st.sampled_from(_groupings(distribution)))),
        target=draw(
            st.one_of(
                st.none(), st.dictionaries(st.just("speedup"), st.floats(1, 20), min_size=1, max_size=1)
            )
        ),
        settings=draw(settings),
        threads=draw(st.integers(1, 64)),
        batch_size=draw(st.integers(1, 64)),
    )


@given(recipes())
def test_reading_what_was_written_gives_an_equal_recipe(recipe: Recipe) -> None:
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_a_recipe_goes_through_a_file(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(A_RECIPE)
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_what_is_left_out_has_its_default() -> None:
    recipe = Recipe.from_yaml(A_RECIPE)
    assert recipe == Recipe(
        "demo:fashion-resnet", "demo:fashion", {"stem.conv": 0.0, "fc": 0.9}, locked=("stem.conv",)
    )


def test_a_number_with_an_exponent_is_a_number_although_yaml_reads_text() -> None:
    recipe = Recipe.from_yaml(A_RECIPE + "optimiser: {weight_decay: 1e-4}\n")
    assert recipe.settings.weight_decay == 1e-4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not YAML"),
        ("- 1\n- 2\n", "the recipe is"),
        ("model: x\n", "not a recipe"),
        (A_RECIPE.replace("version: 1", "version: 7"), "version 7; this program reads version 1"),
        (A_RECIPE + "sparcity: 3\n", "holds sparcity, which is not known"),
        (A_RECIPE + "schedule: {ramps: 0.4}\n", "schedule holds ramps.*known are epochs"),
        (A_RECIPE + "schedule: {ramp: often}\n", "schedule.ramp is 'often'; give a number"),
        (A_RECIPE + "schedule: {ramp: 2}\n", "ramp is 2; give a share"),
        (A_RECIPE + "schedule: {update_every: 1.5}\n", "update_every is 1.5; give a whole number"),
        (A_RECIPE + "schedule: {epochs: true}\n", "epochs is True"),
        (A_RECIPE + "schedule: {epochs: .nan}\n", "epochs is nan"),
        (A_RECIPE + "seed: .inf\n", "seed is inf"),
        (A_RECIPE + "target: {accuracy: 0.9}\n", "exactly one of speedup, latency_ms, sparsity"),
        (A_RECIPE + "groups: [[fc, other]]\n", "groups cannot be used.*other"),
        (A_RECIPE + "groups: fc\n", "groups is 'fc'; give a list of lists"),
        (A_RECIPE + "latency: {threads: 0}\n", "threads is 0"),
        (A_RECIPE + "model: other\n", "'model' is written twice"),
        (A_RECIPE.replace("0.9}", "1.5}"), "'fc' has sparsity 1.5"),
        (A_RECIPE.replace("{sparsity: 0.9}", "0.9"), "distribution of layer 'fc' is 0.9"),
        (A_RECIPE.replace("{sparsity: 0.9}", "{locked: true}"), "sparsity of layer 'fc' is None"),
        (A_RECIPE.replace("true", "maybe"), "locked of layer 'stem.conv' is 'maybe'"),
        (A_RECIPE.replace("model: demo:fashion-resnet", "model: 3"), "model is 3; give it as text"),
        ("a: &a [*a]\n" * 2, "not YAML|not a recipe"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused_with_the_reason(text: str, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        Recipe.from_yaml(text)


def test_a_missing_file_and_a_broken_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"nothing\.yaml"):
        Recipe.load(tmp_path / "nothing.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match=r"bad\.yaml"):
        Recipe.load(tmp_path / "bad.yaml")
