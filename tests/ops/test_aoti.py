"""A collection with code tables ahead of time: exported, compiled by AOTInductor, loaded where nothing was traced."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._inductor import aoti_compile_and_package
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

from tests.ops.cpp.test_kernels import has_compiler
from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import PQConfig
from torchrec_compress.ops import quantize_rows

NUM_ROWS, KEYS = 403, ["a", "b", "c"]
# operators must be known before the package is loaded: TorchRec brings FBGEMM's, `tiers` loads ours
SERVE = """
import sys
import torch
import torchrec
from torchrec_compress.ops import tiers
assert not tiers()[0].passed_over
model = torch._inductor.aoti_load_package(sys.argv[1])
batches = torch.load(sys.argv[2])
torch.save([model(*batch) for batch in batches], sys.argv[3])
"""


class Pooled(torch.nn.Module):
    """A collection whose batch comes as two tensors."""

    def __init__(self):
        super().__init__()
        tables = [
            EmbeddingBagConfig(name="t0", num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=KEYS[:2]),
            EmbeddingBagConfig(name="t1", num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=KEYS[2:]),
        ]
        method = PQConfig(num_codes=4, codebook_size=16, num_hot_rows=30, hot_dtype="fp32", popularity="log2")
        methods = {"t0": method, "t1": replace(method, hot_dtype="int4")}
        self.collection = CompressedEmbeddingBagCollection(tables=tables, compression=methods)
        hot_rows = self.collection.get_buffer("decoder.banks.t1.hot_rows")
        hot_rows.copy_(quantize_rows(torch.randn(30, 16), "int4"))
        self.collection.get_submodule("code_tables.banks.t1").seal()

    def forward(self, values, lengths):
        batch = KeyedJaggedTensor(keys=KEYS, values=values, lengths=lengths)
        return self.collection(batch).values().relu()


def random_batch(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.randint(0, 5, (len(KEYS) * batch_size,))
    lengths[0] = 2
    return torch.randint(0, NUM_ROWS, (int(lengths.sum()),)), lengths


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
# torch 2.13 copies pytrees of its own deprecated class
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_aot_inductor_serves_any_batch_size(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", "cpp")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    model = Pooled().eval()
    batches = [random_batch(batch_size) for batch_size in (4, 4, 9)]
    ids, examples = torch.export.Dim("ids", min=2), torch.export.Dim("examples", min=2)
    shapes = {"values": {0: ids}, "lengths": {0: len(KEYS) * examples}}
    paths = [str(tmp_path / name) for name in ("model.pt2", "batches.pt", "pooled.pt")]
    with torch.no_grad():
        program = torch.export.export(model, batches[0], dynamic_shapes=shapes)
        assert "torchrec_compress.codebook_bags" in str(program.graph)
        options = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # twice as quick to compile, and no less to show
        aoti_compile_and_package(program, package_path=paths[0], inductor_configs=options)
        torch.save(batches, paths[1])
        subprocess.run([sys.executable, "-W", "ignore", "-c", SERVE, *paths], check=True, timeout=120)
        for got, batch in zip(torch.load(paths[2]), batches, strict=True):
            expected = model(*batch)
            assert expected.any() and torch.equal(got, expected)
