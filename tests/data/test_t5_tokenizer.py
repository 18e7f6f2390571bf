import pytest

from train.data import python_sources
from train.data.t5_tokenizer import T5Tokenizer


@pytest.fixture(scope="module")
def small():
    texts = [d.docstring.replace("\n", " ") for d in python_sources.definitions(("json", "email"))]
    return T5Tokenizer.train([t for t in texts if t], 500)


def test_text_and_sentinels_go_there_and_back(small, tmp_path):
    text = "Serialize the object <extra_id_0> as a stream <extra_id_99>"
    ids = small.encode(text)
    assert ids[-1] == 1 and small.size - 1 in ids and small.size - 100 in ids
    assert small.decode([*ids, 0, 0, 7]) == text
    small.save(tmp_path / "spiece.model")
    assert T5Tokenizer.load(tmp_path).encode(text) == ids


def test_mistakes_are_named(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"spiece\.model"):
        T5Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="no room beside 100 sentinels"):
        T5Tokenizer.train(["a"], 90)
    with pytest.raises(ValueError, match="<extra_id_100>: there are 100"):
        small.sentinel(100)
