import pytest

from torchrec_compress.versions import check_versions, installed_versions


@pytest.mark.parametrize(
    ("torch", "torchrec", "fbgemm"),
    [
        ("2.13.0", "1.8.0", "1.8.0"),
        ("2.13.0+cpu", "1.8.0", "1.8.0+cpu"),
        ("2.11.1", "1.6.1", "1.6.0"),
        ("2.14.0", "1.8.0", "1.9.2"),
    ],
)
def test_triplets_that_fit(torch, torchrec, fbgemm):
    check_versions({"torch": torch, "torchrec": torchrec, "fbgemm": fbgemm})


@pytest.mark.parametrize(
    ("torch", "torchrec", "fbgemm", "problem"),
    [
        ("", "1.8.0", "1.8.0", "torch is not installed"),
        ("2.10.0", "1.5.0", "1.5.0", "torch must be at least 2.11"),
        ("2.13.0", "1.8.0", "1.7.0", "torch 2.13 needs fbgemm 1.8"),
        ("2.13.0", "1.8.0", "", "torch 2.13 needs fbgemm 1.8; got torch 2.13.0, torchrec 1.8.0, fbgemm missing"),
        ("2.13.0", "", "1.8.0", "torchrec must be at least 1.6"),
        ("2.13.0", "1.2.0", "1.8.0", "torchrec must be at least 1.6"),
    ],
)
def test_triplets_that_do_not(torch, torchrec, fbgemm, problem):
    with pytest.raises(ImportError, match=problem) as found:
        check_versions({"torch": torch, "torchrec": torchrec, "fbgemm": fbgemm})
    assert "install torch 2.13, torchrec 1.8 and fbgemm-gpu 1.8" in str(found.value)


def test_the_message_names_the_triplet_of_the_torch_at_hand():
    with pytest.raises(ImportError, match=r"install torch 2\.14, torchrec 1\.9 and fbgemm-gpu 1\.9"):
        check_versions({"torch": "2.14.0", "torchrec": "1.9.0", "fbgemm": "1.8.0"})


def test_this_environment_fits():
    found = installed_versions()
    assert all(found.values())
    check_versions(found)
