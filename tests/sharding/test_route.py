"""A user's whole way: train dense on many ranks, compress in place, train on, save, resume elsewhere."""

from benchmarks.in_place import Sizes, resume, route

SIZES = Sizes(rows=12_000, table_rows=400, batch=1024, epochs=1)


def test_the_way_of_a_dlrm(two_ranks, four_ranks, tmp_path):
    first, second = two_ranks.run(route, SIZES, str(tmp_path))
    assert first == second
    assert first["ratio"] > 4
    # in place is no worse than by hand, at once and in its scores, and codes keep what was known
    for mine, by_hand, full in zip(first["in place"], first["by hand"], first["full"], strict=True):
        assert abs(mine - by_hand) < 1e-4
        assert abs(mine - full) < 0.02
    assert first["trained on"] != first["in place"]
    resumed = four_ranks.run(resume, SIZES, str(tmp_path))
    for each in resumed:
        assert all(abs(mine - saved) < 1e-6 for mine, saved in zip(each["resumed"], first["trained on"], strict=True))
        assert each["and trained"] != each["resumed"] and each["and trained"] == resumed[0]["and trained"]
