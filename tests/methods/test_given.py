"""Given codes: what a file says is what is served and trained."""

import numpy as np
import pytest
import torch
from torchrec import EmbeddingConfig

from tests.cases import CODES, NUM_ROWS, batch, counts, fit, fresh, rows, table
from torchrec_compress import CompressedEmbeddingCollection
from torchrec_compress.methods import GivenCodesConfig, RandomCodesConfig

FILE = CODES.format(NUM_ROWS)
GIVEN = torch.from_numpy(np.load(FILE)).long()
IDS = torch.arange(NUM_ROWS)
EITHER = pytest.mark.parametrize("structure", ["product", "residual"])
SIZES = pytest.mark.parametrize("size", [16, 60])  # packed, and not


@EITHER
@SIZES
def test_values_and_gradients_are_those_written_out(structure, size):
    collection = fresh(GivenCodesConfig(codes=FILE, num_codes=4, codebook_size=size, structure=structure))
    books = collection.decoder.banks["item"].codebooks
    leaf = books.detach().clone().requires_grad_()
    found = [leaf.view(4, size, -1)[number, GIVEN[:, number]] for number in range(4)]
    table_of = torch.cat(found, dim=1) if structure == "product" else torch.stack(found).sum(0)
    torch.testing.assert_close(collection.table_rows("item", IDS), table_of)
    got = collection(batch([[1, 2, 2], [], [402, 0]])).values()
    expected = torch.stack([table_of[[1, 2, 2]].sum(0), torch.zeros(16), table_of[[402, 0]].sum(0)])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    loss = torch.randn(3, 16)
    (mine,), (theirs,) = (
        torch.autograd.grad((got * loss).sum(), [books]),
        torch.autograd.grad((expected * loss).sum(), [leaf]),
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_unpooled_rows_are_the_same():
    config = GivenCodesConfig(codes=FILE, num_codes=4, codebook_size=16)
    tables = [EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=["item"])]
    ours = CompressedEmbeddingCollection(tables, compression=config)
    assert torch.equal(ours(batch([IDS.tolist()]))["item"].values(), ours.table_rows("item", IDS))


@EITHER
def test_a_fit_keeps_the_codes_and_finds_the_best_codewords(structure):
    config = GivenCodesConfig(codes=FILE, num_codes=4, codebook_size=16, structure=structure)
    fitted, start = fit(config), fresh(config)
    assert torch.equal(fitted.code_tables.banks["item"].codes, start.code_tables.banks["item"].codes)

    def error(collection):
        left = (collection.table_rows("item", IDS).detach() - rows()).square().sum(1)
        return float((left * counts().clamp(min=1e-3)).sum())

    assert error(fitted) < 0.95 * error(start)
    assert error(fitted) == pytest.approx(
        error(fit(RandomCodesConfig(num_codes=4, codebook_size=16, structure=structure))), rel=0.2
    )


def test_codes_that_stand_for_rows_are_found_again(tmp_path):
    """Two ids of one code are one row; a seed and a name change nothing."""
    np.save(tmp_path / "codes.npy", np.arange(NUM_ROWS)[:, None] % 37)
    config = GivenCodesConfig(codes=tmp_path / "codes.npy", num_codes=1, codebook_size=37)
    assert config == GivenCodesConfig(codes=str(tmp_path / "codes.npy"), num_codes=1, codebook_size=37)
    served = fresh(config, seed=3).table_rows("item", IDS)
    assert torch.equal(served, served[IDS % 37]) and len(served.unique(dim=0)) == 37
    one, other = (
        fresh(config, seed=seed, name=name).code_tables.banks[name].codes for seed, name in ((0, "a"), (5, "b"))
    )
    assert torch.equal(one, other)


def test_hot_rows_want_their_escape_codes_unused(tmp_path):
    options = {"num_codes": 4, "codebook_size": 17, "num_hot_rows": 20}
    fresh(GivenCodesConfig(codes=FILE, **options))
    codes = np.load(FILE)
    codes[5, 0] = 16
    np.save(tmp_path / "codes.npy", codes)
    with pytest.raises(ValueError, match=r"code 0 of id 5 must be in \[0, 16\) \(the others are escape codes"):
        fresh(GivenCodesConfig(codes=str(tmp_path / "codes.npy"), **options))


def test_files_that_do_not_fit_a_table_are_refused_where_it_is_built():
    with pytest.raises(
        ValueError, match=r"table 'item': codes: .*must hold 403 x 2 codes, one row per id, got \(403, 4\)"
    ):
        fresh(GivenCodesConfig(codes=FILE, num_codes=2))
    with pytest.raises(ValueError, match=r"must hold 500 x 4 codes"):
        fresh(GivenCodesConfig(codes=FILE, num_codes=4), num_embeddings=500)
    with pytest.raises(ValueError, match=r"must be in \[0, 8\), got"):
        fresh(GivenCodesConfig(codes=FILE, num_codes=4, codebook_size=8))
    with pytest.raises(ValueError, match=r"GivenCodesConfig\.codes: must be the path of a file, got ndarray"):
        GivenCodesConfig(codes=GIVEN.numpy(), num_codes=4)
    with pytest.raises(ValueError, match="num_coded must be left out with 'given'"):
        fresh(GivenCodesConfig(codes=FILE, num_codes=4, codebook_size=16, num_coded=100))


def test_bytes():
    assert (
        GivenCodesConfig(codes=FILE, num_codes=4, codebook_size=16).stored_bytes(table()) == 403 * 2 + 4 * 16 * 16 + 4
    )
