"""A small share of the fuzzing in tests/fuzz, with a fixed seed."""

from fuzz import configs, converting, weights


def test_interrupted_conversions() -> None:
    counts = converting.run(seed=0, count=12, seconds=300)
    assert counts["cases"] == 12
    assert counts["failures"] == 0, counts


def test_damaged_configurations_tokenizers_and_templates() -> None:
    counts = configs.run(seed=0, count=60, seconds=300)
    assert counts["cases"] == 60
    assert counts["failures"] == 0, counts


def test_damaged_weights() -> None:
    counts = weights.run(seed=0, count=60, seconds=300)
    assert counts["cases"] == 60
    assert counts["failures"] == 0, counts
