import torch

from tests.cases import NUM_ROWS, counts, fit, fresh, rows, table
from torchrec_compress import decompress
from torchrec_compress.methods import HashConfig, TableData
from torchrec_compress.ops import hash_ids, stable_salt

CONFIG = HashConfig(num_buckets=40)
BUCKETS = hash_ids(torch.arange(NUM_ROWS), 40, stable_salt(0, "item"))


def test_ids_of_a_bucket_share_its_row():
    collection = fresh(CONFIG)
    served = decompress(collection).embedding_bags["item"].weight
    (stored,) = [weight for _, weight in collection._native_weights("item")]
    assert stored.shape == (40, 16)
    assert torch.equal(served, stored[BUCKETS])
    assert len(served.unique(dim=0)) == len(BUCKETS.unique())


def test_a_fitted_bucket_is_the_mean_look_up():
    served = decompress(fit(CONFIG)).embedding_bags["item"].weight
    data, seen = rows().double(), counts().double().clamp(min=1e-3)
    for bucket in BUCKETS.unique().tolist():
        mine = (bucket == BUCKETS).nonzero().flatten()
        mean = sum(data[i] * seen[i] for i in mine.tolist()) / sum(seen[i] for i in mine.tolist())
        torch.testing.assert_close(served[mine[0]].double(), mean, rtol=1e-4, atol=1e-5)


def test_a_bucket_of_ids_that_nobody_looked_up_is_their_mean():
    (stored,) = CONFIG.fit(table(), TableData(rows(), torch.zeros(NUM_ROWS))).native.values()
    mine = (BUCKETS == 7).nonzero().flatten()
    torch.testing.assert_close(stored[7], rows()[mine].mean(0))


def test_another_seed_hashes_otherwise_and_fits_as_well():
    def error(seed):
        return float((decompress(fit(CONFIG, seed)).embedding_bags["item"].weight - rows()).square().mean().detach())

    one, other = error(0), error(11)
    assert one != other
    assert abs(one - other) < 0.2 * one


def test_bytes():
    assert CONFIG.stored_bytes(table()) == 40 * 16 * 4
