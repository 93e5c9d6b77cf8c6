"""Selectivity of filters by LAION's published counts."""

from pipelines.laion.cost import side_selectivity


def test_side_selectivity_follows_the_published_counts() -> None:
    assert [round(413 * side_selectivity(side), 1) for side in (1, 256, 512, 1024)] == [413, 211, 67, 9.6]
    shares = [side_selectivity(side) for side in (256, 300, 512, 600, 1024, 2048)]
    assert shares == sorted(shares, reverse=True) and shares[-1] > 0
